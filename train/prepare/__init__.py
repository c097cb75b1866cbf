"""From a folder of images, a crawl or known scenes to MDS shards that training reads."""

from train.prepare.shapes import prepare_shapes

__all__ = ["prepare_shapes"]
