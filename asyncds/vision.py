"""Images from objects: the one transform that nearly everyone needs."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import IO, Any, Literal, cast

from asyncds.errors import ConfigurationError
from asyncds.reader import S3Reader

__all__ = ["ImageTransform"]


class ImageTransform:
    """Decode the object as an image, then apply `transform` to it.

    `mode` is the PIL mode to convert the image to (`"RGB"`, `"L"`; None leaves it as it is). `as_="pil"` hands on a
    `PIL.Image.Image`, for torchvision; `as_="numpy"` an array of shape (height, width[, channels]) and dtype uint8,
    which transforms of albumentations are given in any case, as `image=`. Without `transform` the image is the sample.

    Picklable if `transform` is. Needs pillow (`pip install "asyncds[vision]"`). Raises PIL's errors for broken images.
    """

    def __init__(
        self,
        transform: Callable[..., Any] | None = None,
        mode: str | None = "RGB",
        as_: Literal["pil", "numpy"] = "pil",
    ) -> None:
        if as_ not in ("pil", "numpy"):
            raise ConfigurationError(f"as_={as_!r}: must be 'pil' or 'numpy'")
        if find_spec("PIL") is None:
            raise ConfigurationError("ImageTransform needs pillow: pip install 'asyncds[vision]'")
        self._transform = transform
        self._mode = mode
        self._as = "numpy" if _is_albumentation(transform) else as_

    def __call__(self, object: S3Reader) -> Any:
        import numpy as np
        from PIL import Image

        with Image.open(cast(IO[bytes], object)) as opened:
            image = opened.convert(self._mode) if self._mode is not None else opened.copy()
        picture = image if self._as == "pil" else np.array(image)
        if self._transform is None:
            return picture
        if _is_albumentation(self._transform):
            return self._transform(image=picture)["image"]
        return self._transform(picture)

    def __repr__(self) -> str:
        return f"ImageTransform({self._transform!r}, mode={self._mode!r}, as_={self._as!r})"


def _is_albumentation(transform: object) -> bool:
    return any(base.__module__.split(".")[0] == "albumentations" for base in type(transform).__mro__)
