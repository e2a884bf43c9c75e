"""Where the objects are: the one seam to a store, and the store that speaks S3."""

from asyncds.store.base import ObjectStore
from asyncds.store.connection import Connection
from asyncds.store.s3 import S3Store

__all__ = ["Connection", "ObjectStore", "S3Store"]
