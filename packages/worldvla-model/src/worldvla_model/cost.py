"""What decoding costs: passes, multiplications and bytes for a configuration, and the time they bound from below.

A pass reads every weight once, the keys and values of all tokens so far, and multiplies each new token with the
weights. On a device it takes at least as long as the slower of the two. What is measured can be set beside it.

    chunk = chunk_cost(WorldVLAConfig(), prompt=569, actions=5)
    chunk.passes, chunk.seconds(HARDWARE["H100"])
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from worldvla_model.configuration_worldvla import WorldVLAConfig

BLOCK = 9
"""Tokens of an action: begin, seven values, end."""


@dataclass(frozen=True)
class Hardware:
    """What a device can do at best.

    Attributes:
        flops: multiplications and additions a second, dense, in the type of the weights.
        bandwidth: bytes a second from its memory.
    """

    flops: float
    bandwidth: float


HARDWARE = {
    "H100 PCIe": Hardware(756e12, 2.0e12),
    "H100": Hardware(989e12, 3.35e12),
    "H200": Hardware(989e12, 4.8e12),
    "A100": Hardware(312e12, 2.0e12),
    "L40S": Hardware(362e12, 0.864e12),
    "RTX 4090": Hardware(165e12, 1.008e12),
}
"""GPUs by a part of their name, in bf16; source: the makers' data sheets."""

TYPICAL_CPU = Hardware(80e9, 15e9)
"""Two cores in fp32 that multiply a few tokens at a time, roughly; with many of them they reach more."""

LAUNCH = 1e-3
"""Seconds in which a layer's operations are started one by one, for any number of tokens; on a CPU, roughly."""


@dataclass(frozen=True)
class PassCost:
    """One forward pass.

    Attributes:
        flops: multiplications and additions.
        bytes: read from memory: weights, keys and values.
    """

    flops: float
    bytes: float

    def seconds(self, hardware: Hardware) -> float:
        """The least time it can take."""
        return max(self.flops / hardware.flops, self.bytes / hardware.bandwidth)


@dataclass(frozen=True)
class Cost:
    """Several passes, one after the other.

    Attributes:
        steps: each of them.
    """

    steps: tuple[PassCost, ...]

    @property
    def passes(self) -> int:
        """How many."""
        return len(self.steps)

    @property
    def flops(self) -> float:
        """Multiplications and additions of all."""
        return sum(step.flops for step in self.steps)

    @property
    def bytes(self) -> float:
        """Bytes that all read."""
        return sum(step.bytes for step in self.steps)

    def seconds(self, hardware: Hardware) -> float:
        """The least time that all can take."""
        return sum(step.seconds(hardware) for step in self.steps)


def known_hardware(name: str) -> Hardware | None:
    """The entry of `HARDWARE` for a device as PyTorch names it; the longest that fits, None for none."""
    fitting = [known for known in HARDWARE if known in name]
    return HARDWARE[max(fitting, key=len)] if fitting else None


def body_parameters(config: WorldVLAConfig) -> int:
    """Weights that every token is multiplied with: all but embedding and head."""
    head = config.hidden_size // config.num_attention_heads
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    attention = config.hidden_size * head * 2 * (config.num_attention_heads + kv_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp)


def adapter_parameters(config: WorldVLAConfig, rank: int) -> int:
    """Weights of adapters (LoRA) of a rank beside all linear layers of attention and MLP.

    Args:
        config: of the model.
        rank: width of the two matrices of each.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    head = hidden // config.num_attention_heads
    kv_width = (config.num_key_value_heads or config.num_attention_heads) * head
    ends = 2 * (hidden + hidden) + 2 * (hidden + kv_width) + 3 * (hidden + inner)  # widths in and out
    return config.num_hidden_layers * rank * ends


def free_tokens(config: WorldVLAConfig, hardware: Hardware, *, bytes_per_value: int = 2) -> float:
    """Tokens that a pass multiplies in the time of all else that it does; with more it takes over twice as long.

    Args:
        config: of the model.
        hardware: what the device can do.
        bytes_per_value: of weights.
    """
    body = body_parameters(config)
    started = config.num_hidden_layers * LAUNCH
    return (bytes_per_value * body / hardware.bandwidth + started) * hardware.flops / (2 * body)


def training_flops(config: WorldVLAConfig, tokens: float, squares: float) -> float:
    """Of forward and backward pass through the body; the head is left out.

    Args:
        config: of the model.
        tokens: of all samples.
        squares: Σ length² of the samples.
    """
    return 6 * body_parameters(config) * tokens + 12 * config.num_hidden_layers * config.hidden_size * squares


def pass_cost(
    config: WorldVLAConfig,
    *,
    new: int,
    cached: int = 0,
    logits: int = 1,
    among: int | None = None,
    batch: int = 1,
    bytes_per_value: int = 2,
) -> PassCost:
    """One forward pass with a cache.

    Args:
        config: of the model.
        new: tokens that are fed, of each sequence.
        cached: tokens before them.
        logits: positions of each sequence at which the head is applied.
        among: ids that logits are computed of; None for all.
        batch: sequences.
        bytes_per_value: of weights, keys and values.
    """
    body, head = body_parameters(config), (among or config.vocab_size) * config.hidden_size
    width = config.hidden_size // config.num_attention_heads
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    pairs = 4 * config.hidden_size * (cached + new)  # of a token with all that it may see, in a layer
    # In the last layer a token without logits leaves nothing but its key and value.
    left_out = 2 * (body // config.num_hidden_layers - 2 * config.hidden_size * kv_heads * width) + pairs
    layers = 2 * body * new + config.num_hidden_layers * pairs * new - left_out * (new - logits)
    values = 2 * config.num_hidden_layers * kv_heads * width * (cached + new)
    return PassCost(
        flops=batch * (layers + 2 * head * logits),
        bytes=bytes_per_value * (body + (head if logits else 0) + batch * values),
    )


def chunk_cost(
    config: WorldVLAConfig,
    *,
    prompt: int,
    actions: int,
    dimensions: int = 7,
    exact: bool = False,
    parallel: bool = True,
    among: int | None = None,
    batch: int = 1,
    bytes_per_value: int = 2,
) -> Cost:
    """A chunk of actions.

    Args:
        config: of the model.
        prompt: tokens of the prompt.
        actions: K.
        dimensions: D, values of an action.
        exact: over the whole vocabulary, with the pass that checks the ends.
        parallel: all actions at once; False for the published way, one pass for each token.
        among: ids that logits are computed of; None for all.
        batch: observations at once.
        bytes_per_value: of weights, keys and values.
    """
    one = partial(pass_cost, config, among=among, batch=batch, bytes_per_value=bytes_per_value)
    if not parallel:
        tokens = (dimensions + 2) * actions + 1
        later = (one(new=1, cached=prompt + i) for i in range(tokens - 1))
        return Cost((one(new=prompt, logits=prompt), *later))  # of the whole prompt, as published
    steps = [one(new=prompt + actions, logits=actions + exact)]
    for done in range(1, dimensions):
        steps.append(one(new=actions, cached=prompt + done * actions, logits=actions))
    if exact:
        cached = prompt + dimensions * actions
        steps.append(one(new=2 * actions, cached=cached, logits=2 * actions))
    return Cost(tuple(steps))


def frame_cost(
    config: WorldVLAConfig,
    *,
    prompt: int,
    rows: int,
    columns: int,
    window: int = 0,
    held: float = 0.0,
    among: int | None = None,
    batch: int = 1,
    bytes_per_value: int = 2,
) -> Cost:
    """A frame of rows x columns codes, whose block tokens cost no pass of their own.

    Args:
        config: of the model.
        prompt: tokens of the prompt.
        rows: of codes.
        columns: of codes.
        window: drafted tokens in a pass.
        held: of these, how many hold on average.
        among: ids that logits are computed of; None for all.
        batch: frames at once.
        bytes_per_value: of weights, keys and values.
    """
    one = partial(pass_cost, config, among=among, batch=batch, bytes_per_value=bytes_per_value)
    codes = rows * columns
    steps, done = [one(new=prompt + 3 + window, logits=1 + window)], held + 1
    while done < codes:
        cached = prompt + 3 + round(done)
        steps.append(one(new=1 + window, cached=cached, logits=1 + window))
        done += held + 1
    return Cost(tuple(steps))


__all__ = [
    "HARDWARE",
    "LAUNCH",
    "TYPICAL_CPU",
    "Cost",
    "Hardware",
    "PassCost",
    "adapter_parameters",
    "body_parameters",
    "chunk_cost",
    "frame_cost",
    "free_tokens",
    "known_hardware",
    "pass_cost",
    "training_flops",
]
