"""The training loop: its step, the runs it leaves behind, and what it refuses."""

import gzip
import itertools
import json
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from conftest import ROOT, is_held_out

from nanovision_jax import config as configs
from nanovision_jax import train as verb
from nanovision_jax.data import pipeline
from nanovision_jax.data.tokenizer import Tokenizer
from nanovision_jax.errors import UserError
from nanovision_jax.parallel import energy
from nanovision_jax.parallel import mesh as parallel
from nanovision_jax.runs import checkpoint
from nanovision_jax.runs import config_file as runconfig
from nanovision_jax.runs import folder as runfolder
from nanovision_jax.runs.metrics import read_metrics
from nanovision_jax.training import loop as train
from nanovision_jax.training import meter, optim, resume, step, watching
from nanovision_jax.training import start as starts

pytestmark = pytest.mark.usefixtures('quick')


# The step ------------------------------------------------------------------------------------------------------------

# The loss to be reached on one batch. A projector alone has little to say before a decoder that knows nothing.
STEPS, REACHED = 40, {'clip': 0.1, 'pretrain': 0.1, 'sft': 0.1, 'vision_pretrain': 4.0, 'vision_instruct': 0.1}
MESH = configs.Mesh(2, 2, 2)


def born(cfg, mesh):
    """(the step, a state, the state's shardings)."""
    optimizer = optim.make_optimizer(cfg.optim, STEPS)
    graphdef, shapes = step.abstract_state(cfg, micro.TOKENIZER, optimizer, mesh)
    state, shardings = step.init_state(cfg, micro.TOKENIZER, optimizer, shapes), step.shardings_of(shapes)
    return step.make_train_step(cfg, graphdef, optimizer, shardings), state, shardings


@pytest.fixture(scope='module', params=[*micro.STAGES, 'vision_instruct with muon'])
def trained(request):
    """A stage after some steps on one batch and a few on others, on a mesh of all three axes."""
    stage, _, optimizer = request.param.partition(' with ')
    cfg, mesh, losses = micro.config(stage), parallel.make_mesh(MESH), []
    cfg.optim.name = optimizer or cfg.optim.name
    with jax.set_mesh(mesh), micro.traced_at_most(1):
        take_step, state, shardings = born(cfg, mesh)
        before = jax.device_get(state['params'])
        batch = parallel.put_batch(micro.batch(cfg), mesh)
        for _ in range(STEPS):
            state, metrics = take_step(state, batch)
            losses.append(float(metrics['loss']))
        others = [micro.batch(cfg, seed) for seed in (1, 2)]
        if 'images' in batch:
            others[1]['images'] *= 0  # rows without pictures go the same way
            others[1]['tokens'] %= micro.TOKENIZER.image
        for other in others:
            state, metrics = take_step(state, parallel.put_batch(other, mesh))
    return stage, losses, before, state, shardings, take_step, metrics


def test_one_batch_is_learned_by_heart(trained):
    stage, losses = trained[:2]
    assert losses[-1] < REACHED[stage] < losses[0] / 1.2


def test_what_is_frozen_keeps_its_bytes_and_what_learns_moves(trained):
    stage, _, before, state = trained[:4]
    (old, frozen), (new, still) = (
        step.partition(micro.config(stage), tree) for tree in (before, jax.device_get(state['params']))
    )
    micro.assert_same(still, frozen)
    for (path, a), b in zip(jax.tree.leaves_with_path(new), jax.tree.leaves(old), strict=True):
        assert (a != b).any(), parallel.path_name(path)
    chex.assert_tree_all_finite(new)


def test_the_optimizer_knows_nothing_of_what_is_frozen(trained):
    stage, _, before, state = trained[:4]
    names = [parallel.path_name(path) for path, _ in jax.tree.leaves_with_path(state['optimizer'])]
    learning, frozen = step.partition(micro.config(stage), before)
    learn = sorted(parallel.path_name(path) for path, _ in jax.tree.leaves_with_path(learning))
    first, second = (sorted(name.split(f'/{m}/')[1] for name in names if f'/{m}/' in name) for m in ('mu', 'nu'))
    single = [name.split('/mu/')[1] for name in names if '/muon/' in name and '/mu/' in name]  # Muon has one moment
    assert first == learn
    assert sorted(second + single) == learn
    assert not [name for name in names for part in frozen if part in name.split('/')]


def test_state_stays_where_it_was_born(trained):
    state, shardings = trained[3:5]
    jax.tree.map(lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim) or 1 / 0, state, shardings)


def test_the_step_gives_the_loss_and_the_norms_of_each_part_that_learns(trained):
    stage, *_, metrics = trained
    state = trained[3]
    parts = step.partition(micro.config(stage), state['params'])[0]
    norms = {f'{name}_norm/{part}' for name in ('grad', 'update') for part in parts}
    assert set(metrics) == {'loss', 'grad_norm', 'sound'} | norms
    chex.assert_tree_all_finite(metrics)
    each = [float(metrics[f'grad_norm/{part}']) for part in parts]
    assert float(np.linalg.norm(each)) == pytest.approx(float(metrics['grad_norm']), rel=1e-6)


def test_a_step_that_is_not_finite_leaves_the_state_as_it_is(trained):
    stage, _, _, state, _, take_step, metrics = trained
    assert metrics['sound']
    with jax.set_mesh(parallel.make_mesh(MESH)):
        state = jax.tree.map(jnp.copy, state)
        learned = step.partition(micro.config(stage), state['params'])[0]
        path = jax.tree.leaves_with_path(learned)[0][0]
        poisoned = jax.tree_util.tree_map_with_path(
            lambda at, leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan) if at[1:] == path else leaf, state
        )
        before = jax.device_get(poisoned)
        batch = parallel.put_batch(micro.batch(micro.config(stage)), parallel.make_mesh(MESH))
        after, metrics = take_step(jax.device_put(poisoned, step.shardings_of(state)), batch)
    assert not metrics['sound'] and not checkpoint.finite(after['params'])
    micro.assert_same(jax.device_get(after), before)


def test_a_batch_of_another_shape_is_an_error_for_the_compiled_step():
    cfg, mesh = micro.config('pretrain'), parallel.make_mesh(MESH)
    with jax.set_mesh(mesh):
        step, state, _ = born(cfg, mesh)
        batch = parallel.put_batch(micro.batch(cfg), mesh)
        compiled = step.lower(state, batch).compile()
        state, _ = compiled(state, batch)
        cfg.data.length = 16
        with pytest.raises(TypeError, match=r'int32\[8,16\]'):
            compiled(state, parallel.put_batch(micro.batch(cfg), mesh))


# The road ------------------------------------------------------------------------------------------------------------


def questions(family):
    """A folder with two questions of a benchmark, beside which vqa asks about the run's own data."""
    folder = family / 'questions'
    folder.mkdir(exist_ok=True)
    rows = [{'id': str(i), 'question': 'What is it?', 'answer': answer} for i, answer in enumerate(('red', 'blue'))]
    (folder / 'own.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return folder


def road_config(stage, family):
    """A run of four steps; sft's are counted in epochs, and vision_instruct is asked questions."""
    fields = {
        'sft': dict(steps=0, epochs=0.7),
        'vision_instruct': dict(eval__tasks='vqa,answers', eval__data=str(questions(family)), eval__limit=6),
    }
    return micro.run_config(stage, family, **fields.get(stage, {}))


@pytest.fixture(scope='module')
def road(tmp_path_factory, tiny_family):
    """A family in which every stage was trained, one after the other."""
    family = micro.family(tmp_path_factory.mktemp('road'), tiny_family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(energy, 'counters', lambda: [energy.Counter(itertools.count(1000, 16).__next__)])
        for stage in micro.STAGES:
            assert train.train(road_config(stage, family)) == family / stage
    return family


@pytest.mark.parametrize('stage', micro.STAGES)
def test_a_run_folder_is_complete(road, stage):
    folder = road / stage
    kept = {file.name for file in folder.iterdir()}
    assert kept == {'config.json', 'tokenizer', 'checkpoints', 'metrics.jsonl', 'lineage.json'}
    wanted = road_config(stage, road)
    wanted.model.attention, wanted.model.remat, wanted.optim.accumulate = 'xla', 'none', 1  # what auto came to
    assert runconfig.read(folder) == wanted
    assert Tokenizer(folder / 'tokenizer').digest == Tokenizer(road / 'tokenizer').digest
    assert runfolder.whole_steps(folder) == [4, 2]
    assert runfolder.manifest(folder, 4)['position'] == 4 * 8
    chex.assert_tree_all_finite(micro.read(folder))


@pytest.mark.parametrize('stage', micro.STAGES)
def test_every_line_of_metrics_has_its_fields(road, stage):
    lines = read_metrics(road / stage / 'metrics.jsonl')
    logged = [line for line in lines if 'loss' in line]
    evaluated = [line for line in lines if 'eval_loss' in line]
    names = 'step loss learning_rate grad_norm tokens tokens_per_second mfu waited learned seconds energy'
    parts = step.partition(micro.config(stage), micro.read(road / stage)['params'])[0]
    norms = {f'{name}_norm/{part}' for name in ('grad', 'update') for part in parts}
    assert all(set(line) == set(names.split()) | norms for line in logged)
    assert [line['step'] for line in logged] == [1, 2, 3, 4] and [line['step'] for line in evaluated] == [4]
    assert len(logged) + len(evaluated) == len(lines)
    assert [line['energy'] for line in logged] == [2, 4, 6, 8]  # joules of one of eight devices
    for name in ('tokens', 'seconds'):
        values = [line[name] for line in logged]
        assert values == sorted(set(values)) and values[0] > 0
    assert [line['learning_rate'] for line in logged] == pytest.approx([0, 5e-3, 1e-2, 5.5e-3])
    assert all(line[name] > 0 for line in logged for name in ('loss', 'grad_norm', 'tokens_per_second', 'mfu'))
    assert evaluated[0]['eval_loss'] > 0


def test_an_evaluation_tells_where_the_model_looks_and_what_it_answers(road):
    of = {
        stage: [x for x in read_metrics(road / stage / 'metrics.jsonl') if 'eval_loss' in x] for stage in micro.STAGES
    }
    watched = {'image_attention', 'image_entropy', 'image_norm', 'word_norm'}
    (line,) = of['vision_instruct']
    assert set(line) == {'step', 'eval_loss', 'left_out', 'eval/vqa', 'eval/answers'} | watched
    assert 0 < line['image_attention'] < 1 and 0 < line['image_entropy'] <= 1 + 1e-6 and 0 <= line['eval/vqa'] <= 1
    assert line['image_norm'] > 0 and line['word_norm'] > 0
    assert watched <= set(of['vision_pretrain'][0]) and not watched & set(of['sft'][0]) | watched & set(of['clip'][0])


def test_tasks_that_cannot_be_asked_are_refused_before_anything_is_made(road):
    cfg = road_config('vision_instruct', road)
    cfg.run_dir = str(road / 'other')
    for tasks, data, message in (
        ('vqa,nosuch', '', 'no task'),
        ('pope', '', "eval.data names no folder .* of pope: ''"),
        ('vqa,pope', str(road / 'nowhere'), 'eval.data names no folder .*nowhere'),
    ):
        cfg.eval.tasks, cfg.eval.data = tasks, data
        with pytest.raises(UserError, match=message):
            train.train(cfg)
    for stage in ('clip', 'sft'):
        cfg = road_config(stage, road)
        cfg.run_dir, cfg.eval.tasks = str(road / 'other'), 'vqa'
        with pytest.raises(UserError, match=f'vqa cannot be asked of stage {stage}'):
            train.train(cfg)
    assert not (road / 'other').exists()


def test_tokens_counts_what_is_not_padding(road):
    cfg = micro.run_config('sft', road)
    rows, _ = pipeline.open_rows(cfg, pipeline.family_tokenizer(cfg))
    first, second = (int(sum((rows[i]['segments'] > 0).sum() for i in range(*span))) for span in ((0, 8), (8, 16)))
    lines = read_metrics(road / 'sft' / 'metrics.jsonl')
    assert [line['tokens'] for line in lines[:2]] == [first, first + second]
    assert first < 8 * 128


@pytest.mark.parametrize('stage', micro.STAGES)
def test_lineage_names_the_parents_and_what_stayed_as_it_was(road, stage):
    record = runfolder.read_lineage(road / stage)
    assert (record['stage'], record['finished'], len(record['sessions'])) == (stage, 4, 1)
    assert record['sessions'][0]['mesh'] == {'data': 8, 'fsdp': 1, 'tensor': 1}
    parents = {'sft': ['pretrain'], 'vision_pretrain': ['sft', 'clip'], 'vision_instruct': ['vision_pretrain']}
    assert [parent['run'] for parent in record['parents']] == [str(road / p) for p in parents.get(stage, [])]
    for parent in record['parents']:
        manifest = road / parent['run'] / 'checkpoints' / str(parent['step']) / 'manifest.json'
        assert parent['manifest'] == runfolder.file_digest(manifest) and parent['step'] == 4
    assert record['tokenizer'] == Tokenizer(road / 'tokenizer').digest
    assert record['frozen_before'] == record['frozen_after']
    params = micro.read(road / stage)['params']
    frozen = {'vision_pretrain': ('vision', 'decoder'), 'vision_instruct': ('vision',)}.get(stage, ())
    assert record['frozen_after'] == {name: checkpoint.tree_digest(params[name]) for name in frozen}


def test_what_is_frozen_goes_down_the_road_unchanged(road):
    params = {stage: micro.read(road / stage)['params'] for stage in micro.STAGES}
    micro.assert_same(params['vision_pretrain']['decoder'], params['sft'])
    for stage in ('vision_pretrain', 'vision_instruct'):
        micro.assert_same(params[stage]['vision'], params['clip']['vision'])


def files(folder):
    return {str(file): file.read_bytes() for file in folder.rglob('*') if file.is_file()}


def test_a_finished_run_says_so_and_is_left_alone(road, capsys):
    before = files(road / 'pretrain')
    train.train(micro.run_config('pretrain', road))
    assert f'{road}/pretrain is finished: 4 of 4 steps' in capsys.readouterr().out
    assert files(road / 'pretrain') == before


def test_without_steps_a_run_lasts_its_epochs(road, capsys):
    cfg = road_config('sft', road)
    rows, _ = pipeline.open_rows(cfg, pipeline.family_tokenizer(cfg))
    assert round(0.7 * rows.rows_per_epoch() / 8) == 4
    train.train(cfg)
    assert f'{road}/sft is finished: 4 of 4 steps' in capsys.readouterr().out


def test_of_other_batch_sizes_a_run_of_epochs_goes_on_to_as_many_rows(road):
    """It is at its end after 4 steps of 8 rows, whatever the size of the steps that might follow."""
    cfg = road_config('sft', road)
    mesh = parallel.make_mesh(cfg.mesh, rows=4)
    for cfg.data.batch_size in (4, 8, 16):
        assert train.open_data(cfg, mesh, [], 4).steps == 4


# What is in the way --------------------------------------------------------------------------------------------------


@pytest.fixture
def family(road, tmp_path, monkeypatch):
    """A copy of the road's first two stages, to be spoiled."""
    monkeypatch.setattr(watching, 'watch', lambda *_: {})
    shutil.copytree(
        road,
        tmp_path / 'family',
        symlinks=True,
        ignore=lambda _, names: {'sft'} | {name for name in names if name.startswith('vision_')},
    )
    return tmp_path / 'family'


def refused(cfg, message, **flags):
    """The sentence with which a run is refused; nothing in the family has changed."""
    before = files(cfg.family)
    with pytest.raises(UserError, match=message) as error:
        train.train(cfg, **flags)
    assert '\n' not in str(error.value)
    assert files(cfg.family) == before
    return str(error.value)


def test_a_missing_parent_is_named_with_its_command(tmp_path):
    (tmp_path / 'tiny').mkdir()
    argv = [f'--config={ROOT}/configs/vision_instruct.py:tiny', f'--config.run_dir={tmp_path}/tiny/vision_instruct']
    with pytest.raises(UserError, match=r'Make it: python -m nanovision_jax.train --config=configs/vision_pretrain.py'):
        verb.main(argv)
    assert not list((tmp_path / 'tiny').iterdir())


def test_going_on_and_starting_again_at_once_is_refused(family):
    refused(micro.run_config('pretrain', family), '--resume goes on with a run', resume=True, anew=True)


def test_a_pause_begins_when_the_device_is_through(family, monkeypatch):
    """Also at an evaluation without a log line: what the step still takes would count as no training. The first step is
    waited for too, since the seconds before it are told."""
    done, waited = [], jax.block_until_ready
    paused = meter.Clock.paused
    monkeypatch.setattr(train.jax, 'block_until_ready', lambda x: done.append('waited') or waited(x))
    monkeypatch.setattr(meter.Clock, 'paused', lambda clock: done.append('paused') or paused(clock))
    fields = {'steps': 6, 'eval__every': 5, 'log__every': 4, 'checkpoint__every': 9}
    train.train(micro.run_config('pretrain', family, **fields), anew=True)
    assert done == ['waited'] + ['paused'] * 4 + ['waited', 'paused'] * 2


@pytest.mark.parametrize('seconds, share', [(1e6, 1.0), (0.0, 0.0)])
def test_a_run_that_waits_for_its_data_says_so(seconds, share, family, monkeypatch, capsys):
    """Each step counts the seconds in which its batch was not there; here they are given, as no test is timed."""
    counted, waited = [], train.Log.waited
    monkeypatch.setattr(train.Log, 'waited', lambda log, passed: counted.append(passed) or waited(log, seconds))
    train.train(micro.run_config('pretrain', family, steps=4, log__every=4, eval__every=9), anew=True)
    assert len(counted) == 3 and all(passed >= 0 for passed in counted)  # behind the last step none is wanted
    line = [line for line in read_metrics(family / 'pretrain/metrics.jsonl') if 'loss' in line][-1]
    said = capsys.readouterr().out
    assert line['waited'] == share and 'first step after ' in said
    assert ('100% of the time waiting for data' in said) == bool(share) == ('waiting for data' in said)


def test_a_trace_of_some_steps_is_written(family, capsys):
    train.train(micro.run_config('pretrain', family, steps=6, eval__every=9), anew=True, profile=2)
    (trace,) = (family / 'pretrain/profile').rglob('perfetto_trace.json.gz')
    events = json.loads(gzip.decompress(trace.read_bytes()))['traceEvents']
    assert len(events) > 100 and 'a trace is in' in capsys.readouterr().out


def test_a_run_with_another_config_is_not_overwritten(family, capsys):
    cfg = micro.run_config('pretrain', family, optim__learning_rate=3e-3, steps=6)
    refused(cfg, r'another config \(steps, optim.learning_rate differ\): say --resume .*, --anew .*--config.name')
    old = files(family / 'pretrain')
    train.train(cfg, resume=True)
    assert f'pretrain goes on from {family}/pretrain, step 4' in capsys.readouterr().out
    assert runconfig.read(family / 'pretrain') == cfg
    assert runfolder.whole_steps(family / 'pretrain') == [6, 4]
    assert [line['step'] for line in read_metrics(family / 'pretrain' / 'metrics.jsonl')] == [
        1,
        2,
        3,
        4,
        4,
        5,
        6,
        6,
    ]
    assert old.keys() & files(family / 'pretrain').keys() > {f'{family}/pretrain/checkpoints/4/manifest.json'}


def test_anew_moves_nothing_where_the_new_run_cannot_start(family):
    shutil.rmtree(family / 'pretrain' / 'checkpoints')
    (family / 'sft').mkdir()
    with pytest.raises(UserError, match=r'sft starts from the run \S+/pretrain, which does not exist'):
        train.train(micro.run_config('sft', family), anew=True)
    assert (family / 'sft').exists() and not (family / 'sft.1').exists()


def test_where_a_run_started_stays_as_it_was(family):
    cfg = micro.run_config('pretrain', family, steps=6, init_from=str(family / 'other'))
    refused(cfg, 'init_from would change in .*where a run started stays as it was', resume=True)


def test_checkpoints_without_a_config_are_not_gone_on_with(family):
    (family / 'pretrain' / 'config.json').unlink()
    cfg = micro.config('pretrain', family / 'pretrain')
    with pytest.raises(UserError, match=r'has checkpoints but no config.json'):
        resume.open_run(cfg, resume=False, anew=False)


def test_a_run_does_not_start_from_itself(family):
    with pytest.raises(UserError, match=r'the run itself: choose another --config.name'):
        starts.find(micro.run_config('pretrain', family, init_from=str(family / 'pretrain')), anew=True)


def test_anew_keeps_the_old_run(family, capsys):
    (family / 'pretrain.1').mkdir()  # an older one, from the last time
    old = files(family / 'pretrain')
    train.train(micro.run_config('pretrain', family, steps=2), anew=True)
    assert f'kept as {family}/pretrain.2' in capsys.readouterr().out
    assert {name.replace('pretrain.2', 'pretrain'): data for name, data in files(family / 'pretrain.2').items()} == old
    assert runfolder.whole_steps(family / 'pretrain') == [2]


def test_where_and_how_often_may_change_without_a_word(family):
    cfg = micro.run_config('pretrain', family, log__every=3, eval__every=9, checkpoint__keep=1, data__workers=1)
    cfg.mesh = configs.Mesh(1, 8, 1)
    assert resume.open_run(cfg, resume=False, anew=False) == 4


def test_what_was_settled_stays_so(family):
    """A run that leaves remat and accumulation open goes on as it was compiled, and its kernel may be another one."""
    saved = runconfig.read(family / 'pretrain')
    saved.model.remat, saved.optim.accumulate, saved.model.attention = 'dots', 2, 'splash'
    runconfig.save(saved)
    micro.restamp(family / 'pretrain')
    cfg = micro.run_config('pretrain', family)
    cfg.model.remat, cfg.optim.accumulate = 'auto', 0
    assert resume.open_run(cfg, resume=False, anew=False) == 4
    assert (cfg.model.remat, cfg.optim.accumulate, cfg.model.attention) == ('dots', 2, 'auto')
    cfg.optim.accumulate = 4
    refused(cfg, r'another config \(optim.accumulate differ\)')


def test_another_batch_size_goes_on_at_the_same_row(family, monkeypatch):
    starts, batches = [], pipeline.batches

    def watched(rows, batch_size, start=0, workers=0, timeout=60, own=None):
        starts.append((batch_size, start))
        return batches(rows, batch_size, start, workers, timeout, own)

    monkeypatch.setattr(pipeline, 'batches', watched)
    train.train(micro.run_config('pretrain', family, steps=6, data__batch_size=16, eval__every=9), resume=True)
    assert starts[0] == (16, 4 * 8)
    assert runfolder.manifest(family / 'pretrain', 6)['position'] == 4 * 8 + 2 * 16
    train.train(micro.run_config('pretrain', family, steps=7, data__batch_size=8, eval__every=9), resume=True)
    assert (8, 4 * 8 + 2 * 16) in starts


@pytest.mark.parametrize(
    ('field', 'value', 'changed'), [('seed', 1, 'order'), ('data__length', 64, 'order and packing')]
)
def test_other_rows_than_it_began_with_are_refused(family, field, value, changed):
    cfg = micro.run_config('pretrain', family, steps=6, **{field: value})
    with pytest.raises(UserError, match=rf'other rows than it began with \({changed} changed\).*--config.init_from='):
        train.train(cfg, resume=True)
    assert runfolder.whole_steps(family / 'pretrain') == [4, 2]


def test_another_dtype_of_compute_is_said(family, capsys):
    train.train(micro.run_config('pretrain', family, steps=5, dtype='bfloat16', eval__every=9), resume=True)
    assert 'compute was in float32 in the last session, and is in bfloat16 now' in capsys.readouterr().out


def test_one_held_out_example_is_enough_and_one_that_is_left_out_is_counted(family, tmp_path, capsys):
    """Sets to try things out are small: of these rows two are held out, and one of them has no answer."""
    talks = [[{'from': 'human', 'value': f'{i}?'}, {'from': 'gpt', 'value': 'a cat'}] for i in range(400)]
    held = [talk for talk in talks if is_held_out(talk[0]['value'].encode())]
    rows = [*[talk for talk in talks if talk not in held][:150], held[0], held[1][:1]]
    (tmp_path / 'x.json').write_text(json.dumps([{'conversations': talk} for talk in rows]))
    place = {'data__source': 'conversations', 'data__path': str(tmp_path / 'x.json')}
    train.train(micro.run_config('sft', family, steps=1, eval__every=1, **place))
    line = read_metrics(family / 'sft' / 'metrics.jsonl')[-1]
    assert line['eval_loss'] > 0 and line['left_out'] == 1
    assert 'on held-out data, without 1 examples that cannot be used' in capsys.readouterr().out


def test_resume_with_other_sizes_is_refused_and_the_run_stays_whole(family):
    cfg = micro.run_config('pretrain', family, model__ffn=32, steps=6)
    refused(cfg, r'ffn_in/kernel in \S+ is float32 \[2, 32, 64\], and float32 \[2, 32, 32\] is wanted', resume=True)


def test_resume_with_another_tokenizer_is_refused(family):
    file = family / 'tokenizer' / 'tokenizer.json'
    file.write_text(json.dumps(json.loads(file.read_text()), indent=3))
    cfg = micro.run_config('pretrain', family, steps=6)
    before = files(family / 'pretrain')
    with pytest.raises(UserError, match=r'pretrain was trained with another tokenizer than \S+ is now: bring'):
        train.train(cfg, resume=True)
    assert files(family / 'pretrain') == before


def test_another_tokenizer_than_the_parents_is_refused(family):
    file = family / 'tokenizer' / 'tokenizer.json'
    file.write_text(json.dumps(json.loads(file.read_text()), indent=3))
    refused(micro.run_config('sft', family), rf'{family}/pretrain was trained with another tokenizer than {family}')


def test_another_picture_size_than_the_towers_is_refused(family):
    shutil.copytree(family / 'pretrain', family / 'sft')
    config = family / 'sft' / 'config.json'
    config.write_text(config.read_text().replace('"stage": "pretrain"', '"stage": "sft"'))
    cfg = micro.run_config('vision_pretrain', family)
    cfg.model.vision.image_size = 32
    refused(cfg, rf'model.vision.image_size is 32 here and 16 in {family}/clip')


def test_a_parent_of_the_wrong_stage_is_refused(family):
    cfg = micro.run_config('vision_instruct', family)
    cfg.init_from = str(family / 'pretrain')
    refused(cfg, 'vision_instruct cannot start from .*/pretrain, a pretrain run: it takes vision_pretrain')


def test_a_mesh_that_does_not_fit_is_refused(family):
    cfg = micro.run_config('pretrain', family, steps=6)
    cfg.mesh = configs.Mesh(6, 1, 1)
    refused(cfg, 'uses 6 of 8 devices', resume=True)
    cfg.mesh, cfg.data.batch_size = configs.Mesh(8, 1, 1), 4
    refused(cfg, 'does not divide data.batch_size, which is 4', resume=True)


def test_a_diverged_run_stops_and_saves_no_nonsense(family):
    cfg = micro.run_config(
        'pretrain', family, steps=8, optim__learning_rate=1e30, optim__warmup=0, optim__clip_norm=1e9
    )
    sentence = (
        r'the loss is \S+ and the gradient norm \S+ at step \d: training has diverged.*try a lower optim.learning_rate'
    )
    with pytest.raises(UserError, match=sentence) as error:
        train.train(cfg, anew=True)
    assert re.search('nan|inf', str(error.value))
    for at in runfolder.whole_steps(family / 'pretrain'):
        chex.assert_tree_all_finite(micro.read(family / 'pretrain', at))
    lines = read_metrics(family / 'pretrain' / 'metrics.jsonl')
    assert all(np.isfinite(line['loss']) for line in lines if 'loss' in line)


def llava(cfg, folder, file, rows):
    """The config with these rows as its conversations."""
    (folder / file).write_text(json.dumps(rows))
    cfg.data.source, cfg.data.path = 'conversations', str(folder / file)
    return cfg


def test_more_than_a_hundredth_of_bad_pictures_is_refused(family, llava_folder, tmp_path):
    shutil.copy(llava_folder / 'images.zip', tmp_path)
    rows = json.loads((llava_folder / 'pretrain.json').read_text())
    rows[3]['image'] = rows[5]['image'] = 'nowhere.jpg'
    cfg = llava(micro.run_config('clip', family), tmp_path, 'captions.json', rows)
    with pytest.raises(UserError, match=r'2 of 60 examples of \S+ are bad \(at most 1% may be\): 2 × missing image'):
        train.train(cfg, anew=True)
    assert not (family / 'clip').exists()


def test_a_source_without_answers_is_refused(family, tmp_path):
    rows = [{'id': str(i), 'conversations': [{'from': 'human', 'value': f'Is it {i}?'}]} for i in range(40)]
    cfg = llava(micro.run_config('sft', family), tmp_path, 'questions.json', rows)
    with pytest.raises(UserError, match=r'40 of 40 examples of .* are bad .*: 40 × no answer'):
        train.train(cfg)
    assert not (family / 'sft').exists()


def test_a_batch_in_which_nothing_is_learned_is_an_error(family, monkeypatch):
    def blank(config, tokenizer, split='train', lost=()):
        rows, bad = open_rows(config, tokenizer, split, lost)
        get = type(rows).__getitem__
        monkeypatch.setattr(type(rows), '__getitem__', lambda self, i: get(self, i) | {'weights': np.zeros(128, 'f4')})
        return rows, bad

    open_rows = pipeline.open_rows
    monkeypatch.setattr(pipeline, 'open_rows', blank)
    with pytest.raises(UserError, match='nothing is learned in rows 0 and on'):
        train.train(micro.run_config('sft', family))
    assert not (family / 'sft' / 'checkpoints').exists()
