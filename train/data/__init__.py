"""Image-caption pairs from MosaicML streaming shards (MDS) in a folder or an object store.

Splits are the folders train/ and val/. Columns: `image` (an encoded PNG, JPEG or WebP file), `caption`, `meta`.
The index is checked before streaming sees it, every shard before a sample of it is read.
"""

from train.data.errors import DataError, lost_worker
from train.data.index import Index, read_index
from train.data.loader import TrainLoader
from train.data.samples import read_split
from train.data.source import PROMPTS, Source, open_data, root, split

__all__ = [
    "PROMPTS", "DataError", "Index", "Source", "TrainLoader", "lost_worker",
    "open_data", "read_index", "read_split", "root", "split",
]  # fmt: skip
