"""The little world `shapes` is trained on: how objects move, and what they look like.

Everything is batched torch and seeded by a generator. A `Script` says, chunk by chunk, what is asked for;
`play` moves the objects through it and returns positions, radii and angles per frame; `render` paints them.
The world is a torus: who drifts out on one side comes in on the other. Its rules leave nothing to chance once
the script and the start are known, so that the next chunk has one right answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from turboserve.model.shapes import vocabulary as v

SHAPE_INDEX = {name: i for i, name in enumerate(v.SHAPES)}
MOTION_INDEX = {name: i for i, name in enumerate(v.MOTIONS)}
_DRIFT = torch.tensor([v.DRIFTS.get(name, (0, 0)) for name in v.MOTIONS], dtype=torch.float32)
_SPEED = torch.tensor(list(v.SPEEDS.values()))
_RADIUS = torch.tensor(list(v.SIZES.values()))
_SPIN = torch.tensor([math.radians(one) for one in v.SPIN_DEGREES.values()])
_PULSE = torch.tensor([2 * math.pi / one for one in v.PULSE_FRAMES.values()])
_COLOUR = torch.tensor(list(v.COLOURS.values())) / 255
_BACKGROUND = torch.tensor(list(v.BACKGROUNDS.values())) / 255
_BOUNCE, _GROW, _SPIN_MOTION = (MOTION_INDEX[one] for one in ("bouncing", "growing", "spinning"))


@dataclass
class Script:
    """What is asked for. All int64; B scenes, C chunks, 2 objects. `start` holds the cells (x, y)."""

    count: torch.Tensor  # [B, C], 0 = one object
    background: torch.Tensor  # [B, C]
    shape: torch.Tensor  # [B, C, 2]
    colour: torch.Tensor  # [B, C, 2]
    size: torch.Tensor  # [B, C, 2]
    motion: torch.Tensor  # [B, C, 2]
    speed: torch.Tensor  # [B, C, 2]
    start: torch.Tensor  # [B, 2, 2]
    # [B, C, 2], True where an object is not drawn although it is asked for: context in which a model lost it.
    lost: torch.Tensor | None = None

    def tokens(self) -> torch.Tensor:
        """Token ids [B, C, SLOT_COUNT] (vocabulary.SLOTS)."""
        per_object = torch.stack([self.shape, self.colour, self.size, self.motion, self.speed], -1)
        none = torch.tensor([len(values) - 1 for _, values in v.SLOTS[v.FIRST_OBJECT_SLOT :][: v.OBJECT_SLOT_COUNT]])
        absent = (self.count == 0)[..., None]
        second = torch.where(absent, none, per_object[:, :, 1])
        slots = torch.cat([self.count[..., None], self.background[..., None], per_object[:, :, 0], second], -1)
        return slots + torch.tensor(v.slot_offsets())


@dataclass
class Motion:
    """Where everything is, per pixel frame. F = chunks * CHUNK_FRAMES."""

    centre: torch.Tensor  # [B, F, 2 objects, 2 (x, y)] pixels
    radius: torch.Tensor  # [B, F, 2] pixels
    angle: torch.Tensor  # [B, F, 2] radians


def play(script: Script) -> Motion:
    """Move the objects of each scene through its script."""
    chunks = script.count.shape[1]
    size = float(v.SIZE_PX)
    centre = (script.start.float() + 0.5) * v.CELL_PX
    bounce = torch.ones(centre.shape[:2])
    phase = torch.zeros(centre.shape[:2])
    angle = torch.zeros(centre.shape[:2])
    centres, radii, angles = [], [], []
    for chunk in range(chunks):
        motion, speed, base = script.motion[:, chunk], script.speed[:, chunk], _RADIUS[script.size[:, chunk]]
        if chunk:
            swap = _ambiguous(script, chunk) & (centre[:, 0, 0] > centre[:, 1, 0])
            order = torch.where(swap[:, None], torch.tensor([1, 0]), torch.tensor([0, 1]))
            centre = centre.gather(1, order[..., None].expand(-1, -1, 2))
            bounce, phase, angle = (one.gather(1, order) for one in (bounce, phase, angle))
            # A second object that comes in later stands half a world away: free ground, wherever the first
            # one is.
            grown = (script.count[:, chunk] == 1) & (script.count[:, chunk - 1] == 0)
            opposite = (centre[:, 0] + size / 2) % size
            centre = torch.stack([centre[:, 0], torch.where(grown[:, None], opposite, centre[:, 1])], 1)
            changed = motion != script.motion[:, chunk - 1]
            changed[:, 1] |= grown
            if script.lost is not None:
                centre, found = _found(script, chunk, centre)
                changed |= found
        else:
            changed = torch.ones_like(motion, dtype=torch.bool)
        bounce = torch.where(changed, torch.ones_like(bounce), bounce)
        phase = torch.where(changed, torch.zeros_like(phase), phase)
        angle = torch.where(changed, torch.zeros_like(angle), angle)
        same = (motion[:, 0] == motion[:, 1]) & (speed[:, 0] == speed[:, 1])
        shared = same & (script.count[:, chunk] == 1)
        for frame in range(v.CHUNK_FRAMES):
            if chunk or frame:
                step = _SPEED[speed]
                bouncing = motion == _BOUNCE
                low, high = base, size - base
                bounce = torch.where(bouncing & (centre[..., 1] > high), -torch.ones_like(bounce), bounce)
                bounce = torch.where(bouncing & (centre[..., 1] < low), torch.ones_like(bounce), bounce)
                velocity = _DRIFT[motion] * step[..., None]
                diagonal = torch.stack([step, step * bounce], -1)
                velocity = torch.where(bouncing[..., None], diagonal, velocity)
                centre = (centre + velocity + _apart(centre, shared, bouncing)) % size
                phase = phase + torch.where(motion == _GROW, _PULSE[speed], torch.zeros(()))
                angle = angle + torch.where(motion == _SPIN_MOTION, _SPIN[speed], torch.zeros(()))
            centres.append(centre)
            radii.append(base * (1 + v.PULSE_DEPTH * torch.sin(phase)))
            angles.append(angle)
    return Motion(torch.stack(centres, 1), torch.stack(radii, 1), torch.stack(angles, 1))


def _apart(centre: torch.Tensor, shared: torch.Tensor, bouncing: torch.Tensor) -> torch.Tensor:
    """Velocity [B, 2, 2] that brings two who move alike back to the distance at which streams begin.

    A model's pictures wander by fractions of a pixel; without this the two would meet after some minutes. Whoever keeps
    his distance feels nothing. Those who bounce differ in height by nature and keep apart sideways only.
    """
    low = v.APART_CELLS_MIN * v.CELL_PX
    gap = (centre[:, 1] - centre[:, 0]) % v.SIZE_PX  # [B, 2 axes]
    push = (gap < low).float() - (gap > v.SIZE_PX - low).float()
    push = push * shared[:, None] * torch.stack([torch.ones_like(shared), ~bouncing[:, 0]], 1)
    return torch.stack([-push, push], 1) * v.APART_SPEED


def _found(script: Script, chunk: int, centre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres after lost objects came back, and which did: half a world from the other one, or in the middle."""
    assert script.lost is not None
    before = script.lost[:, chunk - 1]
    found = before & ~script.lost[:, chunk]
    half = v.SIZE_PX / 2
    alone = before.all(1) | (script.count[:, chunk] == 0)
    middle = torch.tensor([[half, half], [0.0, 0.0]])
    place = torch.where(alone[:, None, None], middle, (centre.flip(1) + half) % v.SIZE_PX)
    return torch.where(found[..., None], place, centre), found


def _ambiguous(script: Script, chunk: int) -> torch.Tensor:
    """[B]: both objects were alike before this chunk and no longer are, so that the pictures cannot tell
    which one a slot speaks of. Then the left one is the first: a rule that the pictures do tell.
    """
    before, now = chunk - 1, chunk
    fields = (script.shape, script.colour, script.size, script.motion, script.speed)
    alike_before = torch.stack([one[:, before, 0] == one[:, before, 1] for one in fields]).all(0)
    alike_now = torch.stack([one[:, now, 0] == one[:, now, 1] for one in fields]).all(0)
    two_before = script.count[:, before] == 1
    return two_before & alike_before & ((script.count[:, now] == 0) | ~alike_now)


def _inside(shape: str, dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance to the outline in pixels, positive inside. dx, dy: [N, H, W]; radius: [N, 1, 1]."""
    if shape == "square":
        return radius * 0.88 - torch.maximum(dx.abs(), dy.abs())
    if shape == "triangle":
        half, root = radius * 0.62, math.sqrt(3) / 2
        slanted = half + 0.5 * dy - root * dx.abs()
        return torch.minimum(half - dy, slanted)
    distance = torch.sqrt(dx * dx + dy * dy + 1e-6)
    if shape == "circle":
        return radius - distance
    if shape == "ring":
        return torch.minimum(radius - distance, distance - radius * 0.55)
    # Star: five wedges folded onto one, whose edge runs from the tip (outer, 0) to the notch at 36 degrees.
    outer, notch = radius * 1.15, 0.48
    fold = 2 * math.pi / 5
    theta = torch.atan2(dx, -dy)
    theta = (theta - fold * torch.round(theta / fold)).abs()
    nx, ny = notch * math.sin(fold / 2), 1 - notch * math.cos(fold / 2)
    length = math.hypot(nx, ny)
    along, across = distance * torch.cos(theta), distance * torch.sin(theta)
    return (nx * (outer - along) - ny * across) / length


def render(script: Script, motion: Motion) -> torch.Tensor:
    """Paint every frame, antialiased: float32 [B, F, 3, SIZE_PX, SIZE_PX] in [0, 1]."""
    batch, frames = motion.radius.shape[:2]
    size = v.SIZE_PX
    of_frame = torch.arange(frames) // v.CHUNK_FRAMES
    ramp = torch.linspace(1.25, 0.75, size)
    picture = _BACKGROUND[script.background[:, of_frame]].reshape(-1, 3)[:, :, None, None] * ramp[:, None]
    picture = picture.expand(-1, -1, -1, size).contiguous()
    shown = torch.stack([torch.ones_like(script.count), script.count], -1)[:, of_frame].reshape(-1, 2) == 1
    if script.lost is not None:
        shown &= ~script.lost[:, of_frame].reshape(-1, 2)
    shapes = script.shape[:, of_frame].reshape(-1, 2)
    colours = _COLOUR[script.colour[:, of_frame]].reshape(-1, 2, 3)
    centre, radius, angle = (
        motion.centre.reshape(-1, 2, 2),
        motion.radius.reshape(-1, 2),
        motion.angle.reshape(-1, 2),
    )
    grid = torch.arange(size) + 0.5
    for which in range(v.OBJECTS_MAX):
        for name, index in SHAPE_INDEX.items():
            rows = torch.nonzero((shapes[:, which] == index) & shown[:, which])[:, 0]
            if not len(rows):
                continue
            offset = (grid - centre[rows, which][..., None] + size / 2) % size - size / 2
            dx, dy = offset[:, 0, None, :], offset[:, 1, :, None]
            turn = angle[rows, which][:, None, None]
            dx, dy = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()
            inside = _inside(name, dx, dy, radius[rows, which][:, None, None])
            alpha = (inside + 0.5).clamp(0, 1)[:, None]
            picture[rows] = torch.lerp(picture[rows], colours[rows, which][:, :, None, None], alpha)
    return picture.view(batch, frames, 3, size, size)
