"""LlamaGen's and native Anole's transformers in plain PyTorch.

Written from the papers and the published tensors' names, independent of the
JAX code; no cache: every call sees the whole sequence.
"""

import torch
from torch import nn
import torch.nn.functional as F


class Norm(nn.Module):

  def __init__(self, dim, eps=1e-5):
    super().__init__()
    self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

  def forward(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (
        self.weight)


class FeedForward(nn.Module):

  def __init__(self, dim, hidden):
    super().__init__()
    self.w1 = nn.Linear(dim, hidden, bias=False)
    self.w3 = nn.Linear(dim, hidden, bias=False)
    self.w2 = nn.Linear(hidden, dim, bias=False)

  def forward(self, x):
    return self.w2(F.silu(self.w1(x)) * self.w3(x))


def rotate(x, cos, sin):
  """x [T, n, h] with neighbouring pairs turned; cos, sin [T, h / 2]."""
  pairs = x.reshape(*x.shape[:-1], -1, 2)
  a, b = pairs[..., 0], pairs[..., 1]
  cos, sin = cos[:, None], sin[:, None]
  return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def attend(q, k, v, visible):
  """[T, n * h] of q, k, v [T, n, h] with visible [T, T]."""
  scores = torch.einsum("qnh,knh->nqk", q, k) / q.shape[-1] ** 0.5
  weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
  return torch.einsum("nqk,knh->qnh", weights, v).flatten(1)


class FusedAttention(nn.Module):

  def __init__(self, dim, heads):
    super().__init__()
    self.heads = heads
    self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
    self.wo = nn.Linear(dim, dim, bias=False)

  def forward(self, x, cos, sin, visible):
    q, k, v = (y.unflatten(-1, (self.heads, -1))
               for y in self.wqkv(x).chunk(3, dim=-1))
    return self.wo(attend(rotate(q, cos, sin), rotate(k, cos, sin), v, visible))


class NormedAttention(nn.Module):

  def __init__(self, dim, heads):
    super().__init__()
    self.heads = heads
    self.wq, self.wk, self.wv, self.wo = (
        nn.Linear(dim, dim, bias=False) for _ in range(4))
    self.q_normalization = nn.LayerNorm(dim // heads)
    self.k_normalization = nn.LayerNorm(dim // heads)

  def forward(self, x, cos, sin, visible):
    q, k, v = (w(x).unflatten(-1, (self.heads, -1))
               for w in (self.wq, self.wk, self.wv))
    q = rotate(self.q_normalization(q), cos, sin)
    k = rotate(self.k_normalization(k), cos, sin)
    return self.wo(attend(q, k, v, visible))


class Block(nn.Module):

  def __init__(self, dim, heads, hidden, attention):
    super().__init__()
    self.attention = attention(dim, heads)
    self.feed_forward = FeedForward(dim, hidden)
    self.attention_norm, self.ffn_norm = Norm(dim), Norm(dim)

  def forward(self, x, cos, sin, visible):
    x = x + self.attention(self.attention_norm(x), cos, sin, visible)
    return x + self.feed_forward(self.ffn_norm(x))


def inverse_frequencies(dim, theta):
  return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


class Trunk(nn.Module):

  def __init__(self, vocab_in, vocab_out, dim, layers, heads, hidden,
               attention):
    super().__init__()
    self.head_dim = dim // heads
    self.tok_embeddings = nn.Embedding(vocab_in, dim)
    self.layers = nn.ModuleList(
        Block(dim, heads, hidden, attention) for _ in range(layers))
    self.norm = Norm(dim)
    self.output = nn.Linear(dim, vocab_out, bias=False)

  def run(self, x, angles, scale, visible):
    cos = (angles.cos() * scale).float()
    sin = (angles.sin() * scale).float()
    for layer in self.layers:
      x = layer(x, cos, sin, visible)
    return self.output(self.norm(x))


class Anole(Trunk):
  """Neighbouring pairs turn with the place in the sequence."""

  def __init__(self, vocab, dim, layers, heads, hidden):
    super().__init__(vocab, vocab, dim, layers, heads, hidden, NormedAttention)

  @torch.no_grad()
  def logits(self, ids):
    """[T, V] of ids [T]."""
    freq = inverse_frequencies(self.head_dim, 10_000.0)
    angles = torch.arange(len(ids))[:, None] * freq
    visible = torch.ones(len(ids), len(ids)).tril().bool()
    return self.run(self.tok_embeddings(ids), angles, 1.0, visible)


class Captions(nn.Module):

  def __init__(self, slots, width, dim):
    super().__init__()
    self.register_buffer("uncond_embedding",
                         torch.randn(slots, width) / width**0.5)
    self.cap_proj = nn.Module()
    self.cap_proj.fc1 = nn.Linear(width, dim, bias=False)
    self.cap_proj.fc2 = nn.Linear(dim, dim, bias=False)

  def forward(self, features):
    hidden = F.gelu(self.cap_proj.fc1(features), approximate="tanh")
    return self.cap_proj.fc2(hidden)


class LlamaGen(Trunk):
  """Pairs turn with the row, then the column; condition slots vanish."""

  def __init__(self, vocab, dim, layers, heads, hidden, side, classes=0,
               slots=1, width=0):
    super().__init__(vocab, vocab, dim, layers, heads, hidden, FusedAttention)
    self.side, self.slots = side, slots
    if classes:
      self.cls_embedding = nn.Module()
      self.cls_embedding.embedding_table = nn.Embedding(classes + 1, dim)
    else:
      self.cls_embedding = Captions(slots, width, dim)

  @torch.no_grad()
  def logits(self, condition, mask, codes):
    """[len(codes) + 1, V] after condition [slots, D], visible by mask."""
    x = torch.cat([condition, self.tok_embeddings(codes)])
    length = len(x)
    freq = inverse_frequencies(self.head_dim // 2, 10_000.0)
    cells = torch.arange(length - self.slots)
    angles = torch.zeros(length, self.head_dim // 2, dtype=torch.float64)
    angles[self.slots:] = torch.cat([
        (cells // self.side)[:, None] * freq,
        (cells % self.side)[:, None] * freq], -1)
    scale = torch.ones(length, 1, dtype=torch.float64)
    scale[:self.slots] = 0.0
    visible = torch.ones(length, length).tril().bool()
    visible[:, :self.slots] &= mask
    visible |= torch.eye(length).bool()
    return self.run(x, angles, scale, visible)[self.slots - 1:]
