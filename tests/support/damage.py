"""Copies of a file's bytes that a disk, a download or an editor damaged."""

import random


def damaged(data: bytes, other: bytes, rng: random.Random) -> bytes:
  """Cut, emptied, zeroed, with a flipped bit or new bytes, or swapped."""
  at = rng.randrange(len(data))
  flipped = bytearray(data)
  flipped[at] ^= 1 << rng.randrange(8)
  return rng.choice([
      data[:at], b"", bytes(flipped), other, data + data,
      data[:at] + bytes(64) + data[at + 64:],
      data[:at] + rng.randbytes(5) + data[at:]])
