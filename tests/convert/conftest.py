"""What tests of checkpoint files share."""

import io
import pickle
import sys
import types
import zipfile

import ml_dtypes
import pytest

from tests.support.torch_files import Storage, stub


@pytest.fixture
def torch_file(tmp_path, monkeypatch):
  """Writes an object with tensors as torch.save does."""
  root, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
  for kind in ("FloatStorage", "BFloat16Storage"):
    setattr(root, kind, stub("torch", kind))
  utils._rebuild_tensor_v2 = stub("torch._utils", "_rebuild_tensor_v2")
  monkeypatch.setitem(sys.modules, "torch", root)
  monkeypatch.setitem(sys.modules, "torch._utils", utils)

  def write(value, name="model.pt"):
    data, storages = io.BytesIO(), []

    class Pickler(pickle.Pickler):
      def persistent_id(self, obj):
        if not isinstance(obj, Storage):
          return None
        storages.append(obj.array)
        kind = ("BFloat16Storage" if obj.array.dtype == ml_dtypes.bfloat16
                else "FloatStorage")
        return ("storage", getattr(root, kind), str(len(storages) - 1), "cpu",
                obj.array.size)

    Pickler(data, protocol=2).dump(value)
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
      archive.writestr("model/data.pkl", data.getvalue())
      for i, array in enumerate(storages):
        archive.writestr(f"model/data/{i}", array.tobytes())
    return tmp_path / name

  return write
