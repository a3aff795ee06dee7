"""A dataset of TFDS, written and read without TensorFlow."""

import io
import json
import pickle

from array_record.python import array_record_module
from PIL import Image
import pytest
from tensorflow_datasets.proto import tf_example_generated_pb2 as proto

from ssd_jax.core.config import UserError
from ssd_jax.data import sources
from ssd_jax.data.tfds import TFDSSource
from tests.support.made_pictures import check_item


def feature(kind, **settings):
  """A feature as TFDS stores it."""
  module, name = kind
  path = f"tensorflow_datasets.core.features.{module}.{name}"
  return {"pythonClassName": path, **settings}


def write_tfds(root, file_format="array_record", count=12):
  """A dataset "pets" as TFDS lays it out, made without TensorFlow."""
  folder = root / "pets" / "1.0.0"
  folder.mkdir(parents=True)
  shard = folder / f"pets-train.{file_format}-00000-of-00001"
  writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
  for i in range(count):
    example = proto.Example()
    values = example.features.feature
    png = io.BytesIO()
    Image.new("RGB", (12, 9), (i, i, i)).save(png, "png")
    blob = png.getvalue() if i != 5 else png.getvalue()[:45]
    values["image"].bytes_list.value.append(blob)
    values["captions"].bytes_list.value.extend([b"pet %d" % i, b"animal"])
    values["label"].int64_list.value.append(i % 2)
    writer.write(example.SerializeToString())
  writer.close()
  image = {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8",
           "encodingFormat": "png"}
  text = feature(("text_feature", "Text"), text={})
  features = feature(("features_dict", "FeaturesDict"), featuresDict={
      "features": {
          "image": feature(("image_feature", "Image"), image=image),
          "captions": feature(("sequence_feature", "Sequence"), sequence={
              "feature": text, "length": "-1"}),
          "label": feature(("class_label_feature", "ClassLabel"),
                           classLabel={"numClasses": "2"}),
      }})
  info = {"name": "pets", "version": "1.0.0", "fileFormat": file_format,
          "splits": [{
              "name": "train", "numBytes": "100", "shardLengths": [str(count)],
              "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-"
                                  "{SHARD_X_OF_Y}"}]}
  (folder / "features.json").write_text(json.dumps(features))
  (folder / "dataset_info.json").write_text(json.dumps(info))
  (folder / "label.labels.txt").write_text("black_cat\ndog\n")
  return str(root)


def test_tfds_items(tmp_path):
  """A prepared dataset gives items by text or label, without TensorFlow."""
  root = write_tfds(tmp_path)
  source = TFDSSource("pets", "train", 8, data_dir=root)
  assert len(source) == 12
  check_item(source[3], 8)
  assert source[3]["caption"] == "pet 3" and (source[3]["image"] == 3).all()
  spec = f"tfds:pets?caption_key=label&data_dir={root}&split=train[:4]"
  labels = sources.open_source(spec, "all", 8)
  assert [labels[i]["caption"] for i in range(len(labels))] == [
      "black cat", "dog"] * 2
  assert labels._caption(-1) == ""  # unlabelled
  joined = spec.replace("train[:4]", "train[:4]+train[8:10]")
  assert len(sources.open_source(joined, "all", 8)) == 6
  parts = [
      sources.open_source(f"tfds:pets:1.0.0?data_dir={root}", split, 8)
      for split in ("train", "validation")
  ]
  assert sorted(int(k) for p in parts for k in p.keys) == list(range(12))
  assert pickle.loads(pickle.dumps(source))[1]["caption"] == "pet 1"
  with pytest.raises(UserError, match="item 5 of pets split 'train'"):
    source[5]


@pytest.mark.parametrize("options, match", [
    ({"name": "cats"}, "got cats.*tfds build cats --file_format=array_record"),
    ({"split": "test"}, "'test'.*train"),
    ({"image_key": "picture"}, "'captions', 'image'.*image_key=picture"),
    ({"caption_key": "text"}, "'captions', 'image'.*caption_key=text"),
])
def test_tfds_errors(tmp_path, options, match):
  """What a dataset lacks is one line that says what it has."""
  options = {"name": "pets", "split": "train", **options}
  with pytest.raises(UserError, match=match) as error:
    TFDSSource(pixels=8, data_dir=write_tfds(tmp_path), **options)
  assert "\n" not in str(error.value)


def test_tfds_without_random_access(tmp_path):
  """A dataset in TFDS's old format says how to prepare it again."""
  root = write_tfds(tmp_path, "tfrecord")
  with pytest.raises(UserError, match="as tfrecord.*tfds build pets"):
    TFDSSource("pets", "train", 8, data_dir=root)
