"""Stand-ins for what torch pickles, so that no PyTorch is needed."""

from collections import OrderedDict
import sys


class Storage:
  """What a pickled tensor refers to."""

  def __init__(self, array):
    self.array = array


class Tensor:
  """A view of a storage, pickled as torch pickles tensors."""

  def __init__(self, storage, offset, shape, strides):
    self.args = (storage, offset, shape, strides, False, OrderedDict())

  def __reduce__(self):
    return sys.modules["torch._utils"]._rebuild_tensor_v2, self.args


def stub(module, name):
  """A function of that name that must never be called."""

  def function(*args):
    raise AssertionError(f"{module}.{name} was called")

  function.__module__, function.__qualname__ = module, name
  function.__name__ = name
  return function
