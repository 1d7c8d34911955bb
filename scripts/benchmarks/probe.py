"""Where a colour, a shape and a size can be read: linear probes of the tower, the projector and the decoder.

    python scripts/benchmarks/probe.py --run=runs/tiny/vision_instruct [--things=3] [--train=6000] [--test=1000]

Probes learn from new pictures of seen pairs of colour and shape, and are tested on others of those, and on pictures of
the unseen pairs. A probe may itself learn that a pair never comes, whatever the features are like: so the control is
probes that lack seven other pairs, which the model knows, tested on these. By as much as `unseen` is below the control,
the features do not tell.

`answer` is no probe but what the decoder says, the likeliest word of those that answer. A run without a decoder (clip)
has its tower probed. Pictures hold --things; the one that is asked about is in its own cell, whose patch is read.

Prints a table in Markdown: percent right, with 95% bootstrap intervals.
"""

import argparse
import functools
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from nanovision_jax import load, models  # noqa: E402
from nanovision_jax.data import conversation  # noqa: E402
from nanovision_jax.data.datasets import tiny_world_scenes as scenes  # noqa: E402
from nanovision_jax.errors import UserError  # noqa: E402
from nanovision_jax.evals.base import interval  # noqa: E402
from nanovision_jax.stages import stage_of  # noqa: E402

VALUES = {'colour': scenes.COLOURS, 'shape': scenes.SHAPES, 'size': scenes.SIZES}
QUESTIONS = {
    'colour': 'What colour is the thing in the {place}?',
    'shape': 'What shape is the thing in the {place}?',
    'size': 'How big is the thing in the {place}?',
}
# Seven pairs by the rule of the unseen ones, from another colour on.
CONTROL = tuple((scenes.COLOURS[(3 * k + 1) % 8], scenes.SHAPES[k % 6]) for k in range(7))
TESTS = ('seen', 'unseen', 'control')
RIDGES = 10.0 ** np.arange(-4, 3)  # of which a held-out quarter chooses; 1 is as much as the data themselves weigh
BATCH = 250


class Pictures(NamedTuple):
    """N pictures, uint8 [N, height, width, 3], and the thing of each that is asked about."""

    images: np.ndarray
    things: list[scenes.Thing]

    def labels(self, kind):
        """What is right for each, as an index into VALUES[kind]."""
        return np.array([VALUES[kind].index(getattr(thing, kind)) for thing in self.things])


def draw(n: int, things: int, seed: int, pairs) -> Pictures:
    """n pictures of so many things, of which the one asked about is of one of `pairs`, the others of seen ones."""
    rng, images, focus = np.random.default_rng([2, seed]), [], []
    for _ in range(n):
        chosen = [scenes.pick(rng, pairs)]
        while len(chosen) < things:
            other = scenes.pick(rng, scenes.SEEN)
            chosen += [other] * (other not in chosen)
        places = [scenes.PLACES[cell] for cell in rng.permutation(9)[:things]]
        sizes = [scenes.pick(rng, scenes.SIZES) for _ in chosen]
        scene = [scenes.Thing(*thing) for thing in zip(sizes, *zip(*chosen, strict=True), places, strict=True)]
        images.append(scenes.render(scene, rng))
        focus.append(scene[0])
    return Pictures(np.stack(images), focus)


class Features:
    """What a run makes of Pictures, layer by layer."""

    def __init__(self, run):
        self.run, self.sees = run, stage_of(run.config).sees
        vision = run.config.model.vision
        self.side = vision.image_size // vision.patch_size
        if vision.image_size != scenes.PIXELS or self.side % 3:
            raise UserError('probes read a thing from its cell: patches must divide the 3 × 3 cells of tiny_world.')

    def of(self, pictures: Pictures, single: bool) -> dict[tuple[str, str], np.ndarray]:
        """{(layer, kind of question, '' for any): [N, width]}; of ('answer', kind) the index into VALUES[kind], [N]."""
        found = {}
        for start in range(0, len(pictures.things), BATCH):
            part = Pictures(pictures.images[start : start + BATCH], pictures.things[start : start + BATCH])
            for name, values in self._batch(part, single).items():
                found.setdefault(name, []).append(np.asarray(values))
        return {name: np.concatenate(values) for name, values in found.items()}

    def _batch(self, pictures, single):
        cells = np.array([scenes.PLACES.index(thing.place) for thing in pictures.things])
        images, run = pictures.images, self.run
        tower = _tower(run.graphdef, run.params, images)
        found = {('pixels', ''): self._cell(_patches(images, self.side), cells)}
        found['tower', ''] = self._cell(tower, cells)
        if single:
            found['tower, mean of all patches', ''] = tower.mean(axis=1)
        if not self.sees:
            return found
        found['projector', ''] = self._cell(_projected(run.graphdef, run.params, tower), cells)
        for kind, question in QUESTIONS.items():
            ids = [self._ids(question.format(place=thing.place)) for thing in pictures.things]
            last = np.array([len(row) - 1 for row in ids])
            tokens, segments = (np.zeros((len(ids), 64), np.int32) for _ in range(2))
            for row, (put, mark) in enumerate(zip(tokens, segments, strict=True)):
                put[: len(ids[row])], mark[: len(ids[row])] = ids[row], 1
            hidden, logits = _decoded(run.graphdef, run.params, tokens, segments, tower, last)
            found['decoder, before the answer', kind] = hidden
            words = [run.tokenizer.encode(value.capitalize())[0] for value in VALUES[kind]]
            found['answer', kind] = np.asarray(logits)[:, words].argmax(axis=1)
        return found

    def _ids(self, question):
        content = [{'type': 'image'}, {'type': 'text', 'text': question}]
        patches = [self.run.config.model.vision.patches]
        asked = [{'role': 'user', 'content': content}]
        return conversation.encode(asked, self.run.tokenizer, patches, question=True).ids

    def _cell(self, patches, cells):
        """The mean of the patches of each row's cell: patches [N, P, E] → [N, E]."""
        n, k = len(patches), self.side // 3
        grid = np.asarray(patches).reshape(n, 3, k, 3, k, -1).mean(axis=(2, 4)).reshape(n, 9, -1)
        return grid[np.arange(n), cells]


def _patches(images, side):
    n, p = len(images), images.shape[1] // side
    return images.reshape(n, side, p, side, p, 3).swapaxes(2, 3).reshape(n, side * side, -1) / np.float32(255)


@functools.partial(jax.jit, static_argnums=0)
def _tower(graphdef, params, images):
    vision = models.merge(graphdef, params).vision
    return vision.features(vision.normalize(images))


@functools.partial(jax.jit, static_argnums=0)
def _projected(graphdef, params, features):
    return models.merge(graphdef, params).projector(features)


@functools.partial(jax.jit, static_argnums=0)
def _decoded(graphdef, params, tokens, segments, features, last):
    model = models.merge(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.hidden(tokens, positions, segments, features=features[:, None])
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return hidden[:, 0], model.logits(hidden)[:, 0]


# Probes --------------------------------------------------------------------------------------------------------------


def fit(features, labels, classes):
    """A probe: features [N, E] → the likeliest classes [N]. Ridge regression to one-hot labels, in closed form."""
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-6

    def standard(x):
        return np.concatenate([(x - mean) / scale, np.ones((len(x), 1))], axis=1)

    x, y, learn = standard(features).astype(np.float64), np.eye(classes)[labels], 3 * len(labels) // 4

    def solve(x, y, ridge):
        return np.linalg.solve(x.T @ x + ridge * len(x) * np.eye(x.shape[1]), x.T @ y)

    def held(ridge):
        return (x[learn:] @ solve(x[:learn], y[:learn], ridge)).argmax(axis=1) == labels[learn:]

    weights = solve(x, y, max(RIDGES, key=lambda ridge: held(ridge).mean()))
    return lambda features: (standard(features) @ weights).argmax(axis=1)


def measure(run, things: int, n_train: int, n_test: int) -> dict:
    """{(layer, kind): {'seen' | 'unseen' | 'control': 0 and 1s}}."""
    features = Features(run)
    drawn = {
        'train': draw(n_train, things, 0, scenes.SEEN),
        'seen': draw(n_test, things, 1, scenes.SEEN),
        'unseen': draw(n_test, things, 2, scenes.UNSEEN),
        'control': draw(n_test, things, 3, CONTROL),
    }
    made = {name: features.of(pictures, things == 1) for name, pictures in drawn.items()}
    without = np.array([thing.pair not in CONTROL for thing in drawn['train'].things])
    found = {}
    for (layer, only), x in made['train'].items():
        for kind in [only] if only else VALUES:
            wanted = {name: pictures.labels(kind) for name, pictures in drawn.items()}
            said = {name: values[layer, only] for name, values in made.items()}
            if layer != 'answer':
                probe = fit(x, wanted['train'], len(VALUES[kind]))
                control = fit(x[without], wanted['train'][without], len(VALUES[kind]))
                said = {name: (control if name == 'control' else probe)(values) for name, values in said.items()}
            found[layer, kind] = {name: (said[name] == wanted[name]).astype(float) for name in TESTS}
    return found


def table(found) -> list[str]:
    """Lines of Markdown."""
    lines = ['| | | seen pairs | unseen pairs | control |', '|---|---|---|---|---|']
    for (layer, kind), scores in found.items():
        cells = []
        for split in TESTS:
            low, high = interval(scores[split], range(len(scores[split])))
            cells.append(f'{100 * scores[split].mean():.1f}% ({100 * low:.1f} to {100 * high:.1f})')
        lines.append(f'| {layer} | {kind} | {" | ".join(cells)} |')
    return lines


def main(argv=None):
    """The command: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--run', required=True)
    parser.add_argument('--things', type=int, default=1, choices=(1, 2, 3))
    parser.add_argument('--train', type=int, default=6000)
    parser.add_argument('--test', type=int, default=1000)
    args = parser.parse_args(argv)
    run = load(args.run)
    print(
        f'{args.run}, pictures of {args.things}:\n', *table(measure(run, args.things, args.train, args.test)), sep='\n'
    )


if __name__ == '__main__':
    main()
