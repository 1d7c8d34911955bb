"""A plan as text, and as JSON."""

from nanovision_jax.planning import estimate
from nanovision_jax.planning.machines import SEEN

GIB = 2**30


def lines(plans: list) -> list[str]:
    """What is told of the plans of some stages on one machine."""
    machine, chip = plans[0].machine, plans[0].machine.chip
    if chip:
        told = (
            f'{machine.name}: {machine.count} × {chip.flops / 1e12:.0f} TFLOP/s, {chip.memory:.1f} GiB, '
            + (f'${chip.price:.2f} a chip and hour' if chip.price else 'no price known (--price)')
            + f' ({chip.source}; prices of {SEEN}, check before you pay)'
        )
    else:
        told = f'{machine.name}: the devices at hand'
    found = [told]
    for plan in plans:
        found += ['', *_stage(plan)]
    if len(plans) > 1:
        hours, dollars = (sum(getattr(plan, what) for plan in plans) for what in ('hours', 'dollars'))
        found += ['', f'all {len(plans)} stages: {_hours(hours)}' + f', ${dollars:,.0f}' * bool(dollars)]
        if not all(plan.fits for plan in plans):
            found += [f'does not fit: {", ".join(plan.config.stage for plan in plans if not plan.fits)}']
    if chip and chip.host > 1 and (spans := estimate.scaling(plans[-1])):
        found += ['', *_scaling(plans[-1], spans)]
    return found


def _stage(plan):
    config, chip = plan.config, plan.machine.chip
    token, share = plan.flops / plan.tokens, plan.learned / plan.parameters
    room = f'{plan.memory / GIB:.1f} GiB' if plan.memory else 'nothing says how much there is'
    how = f'compiled for {plan.compiled}' if plan.compiled else 'an estimate'
    held = ', '.join(f'{what} {size / GIB:.2f}' for what, size in plan.parts.items())
    most = plan.most_rows
    rows = f'{plan.rows} rows of {config.data.length} tokens a device at once, up to {most} would fit'
    if most < 1:
        rows = f'not one row of {config.data.length} tokens fits: split the model with mesh.fsdp, or lower data.length'
    yield f'{config.stage}: {plan.parameters:,} parameters, {share:.0%} of them learn'
    yield (
        f'  work    {token / 1e9:.3g} GFLOP a token, {plan.tokens:,} tokens'
        f'{f" and {plan.images:,} images" if plan.images else ""} a step, {plan.steps:,} steps, '
        f'{plan.steps * plan.tokens / 1e9:.3g}B tokens'
    )
    yield f'  memory  {plan.peak / GIB:.2f} of {room} a device ({how}): {"fits" if plan.fits else "DOES NOT FIT"}'
    yield f'          of them, GiB: {held}'
    if plan.process:
        yield f'          the process in all: {plan.process / GIB:.2f} GiB'
    yield f'          remat={config.model.remat}, accumulate={config.optim.accumulate}: {rows}'
    if plan.sent:
        sent = f'  sent    {plan.sent / 1e6:,.0f} MB a device and step'
        if chip:
            seconds = estimate.seconds_sent(chip, plan.machine.count, plan.sent)
            speed = plan.sent / seconds / 1e9
            sent += f', {seconds * 1e3:.1f} ms at {speed:.0f} GB/s, in a step of {plan.step * 1e3:.0f} ms'
        yield sent
    dollars = f', ${plan.dollars:,.2f}' if chip and chip.price else ''
    yield f'  time    {plan.step:.3g} s a step ({plan.source}), {_hours(plan.hours)}{dollars}'


def _scaling(plan, spans):
    """The weak scaling of a stage, with its arithmetic."""
    chip, config = plan.machine.chip, plan.config
    yield (
        f'{config.stage} on more chips, each with the same work of {plan.step:.3g} s: gradients of {plan.learned:,} '
        f'parameters in {config.optim.reduce_dtype},'
    )
    yield f'  2·(n-1)/n of them over {chip.link:g} GB/s between the n ≤ {chip.host} chips of a host; what is sent'
    yield '  beyond what the planned ones send, which their share of the peak has in it, overlaps with nothing'
    if chip.network:
        yield f"  2·(h-1)/h of a chip's share of them over {chip.network:g} GB/s between h hosts"
    for count, seconds, efficiency in spans:
        yield f'  {count:5,} chips: {seconds * 1e3:6.1f} ms sent, {efficiency:.1%} at least'


def _hours(hours):
    return f'{hours:.1f} hours' if hours >= 1 else f'{hours * 60:.1f} minutes'


def as_json(plan) -> dict:
    """A plan as an object of plain values."""
    kept = plan._asdict() | {name: getattr(plan, name) for name in ('fits', 'hours', 'dollars')}
    config = kept.pop('config')
    return kept | {
        'stage': config.stage, 'remat': config.model.remat, 'accumulate': config.optim.accumulate,
        'attention': config.model.attention, 'machine': plan.machine.name, 'chips': plan.machine.count,
    }  # fmt: skip
