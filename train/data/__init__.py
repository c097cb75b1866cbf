"""Image-caption pairs from MosaicML streaming shards (MDS) in a folder or an object store.

Splits are the folders train/ and val/. Columns: `image` (an encoded PNG, JPEG or WebP file) or `moments`
(`python -m train.prepare moments`), `caption` and other captions, `meta`. A split may be one folder for each aspect.
The index is checked before streaming sees it, every shard before a sample of it is read.
"""

from train.data.corpora import MOMENTS, Part, open_data, sizes
from train.data.errors import DataError, lost_worker
from train.data.index import Index, read_index
from train.data.loader import TrainLoader
from train.data.samples import collate, read_split
from train.data.source import PROMPTS, Source, root, split

__all__ = [
    "MOMENTS", "PROMPTS", "DataError", "Index", "Part", "Source", "TrainLoader", "collate", "lost_worker", "open_data",
    "read_index", "read_split", "root", "sizes", "split",
]  # fmt: skip
