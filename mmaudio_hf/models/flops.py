"""Floating-point operations of the flow network, by formula: a product of (n, a) and (a, b) matrices is 2nab of them.

Counted are matrix products, convolutions and attention, as model FLOP utilisation is defined (Chowdhery et al. 2022,
PaLM, appendix B): what is recomputed, normalisation and activations do not count.
"""

from mmaudio_hf.config import ModelConfig


def forward_flops(config: ModelConfig) -> int:
    """Operations of one forward pass of one sample."""
    dim, latent, clip, text = config.hidden_dim, config.latent_length, config.clip_length, config.text_tokens
    embedded = dim if config.v2 else 256
    total = _map(latent, config.latent_channels, dim, 7) + _gated(latent, dim, 7)
    total += _map(config.sync_length, config.sync_dim, dim, 7) + _gated(config.sync_length, dim, 3)
    total += _map(clip, config.clip_dim, dim) + _gated(clip, dim, 3)
    total += _map(text, config.text_dim, dim) + _gated(text, dim)
    total += _map(1, embedded, dim) + 3 * _map(1, dim, dim) + _gated(1, dim)  # time, and the global condition
    for number in range(config.joint_depth):
        ends = number == config.joint_depth - 1  # the last joint block reads the other streams and leaves them
        total += _block(latent, latent, dim, 3) + _block(clip, 1, dim, 3, ends) + _block(text, 1, dim, 1, ends)
        total += _attention(latent + clip + text, dim)
    total += config.fused_depth * (_block(latent, latent, dim, 3) + _attention(latent, dim))
    return total + _map(1, dim, 2 * dim) + _map(latent, dim, config.latent_channels, 7)


def training_flops(config: ModelConfig) -> int:
    """Operations of forward and backward of one sample: the backward pass makes every product twice over."""
    return 3 * forward_flops(config)


def _map(tokens: int, inputs: int, outputs: int, kernel_size: int = 1) -> int:
    return 2 * tokens * inputs * outputs * kernel_size


def _gated(tokens: int, dim: int, kernel_size: int = 1) -> int:
    hidden = -(-int(8 * dim / 3) // 256) * 256
    return 3 * _map(tokens, dim, hidden, kernel_size)


def _attention(tokens: int, dim: int) -> int:
    return 2 * _map(tokens, tokens, dim)


def _block(tokens: int, conditions: int, dim: int, kernel_size: int, pre_only: bool = False) -> int:
    """One stream's share: queries, keys, values and modulation, and unless `pre_only` output map and feed-forward."""
    total = _map(tokens, dim, 3 * dim) + _map(conditions, dim, (2 if pre_only else 6) * dim)
    return total if pre_only else total + _map(tokens, dim, dim, kernel_size) + _gated(tokens, dim, kernel_size)
