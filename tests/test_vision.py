"""Images from objects: with torchvision, with albumentations, with neither, and when they are broken."""

import io
import pickle

import albumentations
import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from asyncds import CachedS3MapDataset, ImageTransform, S3Reader
from asyncds.errors import ConfigurationError
from asyncds.testing import FakeStore

# Python 3.12 warns of every fork beside a thread, and the dataset's loop is one.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")

TO_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def reader(body: bytes) -> S3Reader:
    return S3Reader("mnist", "train/1.png", body)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_image_is_rgb_unless_told_otherwise(png):
    image = ImageTransform()(reader(png(7)))
    assert (image.mode, image.size, image.getpixel((3, 3))) == ("RGB", (28, 28), (7, 7, 7))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "CMYK", "F"])
def test_image_has_the_mode_that_was_asked_for(png, mode):
    image = ImageTransform(mode=mode)(reader(png(200)))
    expected = Image.open(io.BytesIO(png(200))).convert(mode)
    assert image.mode == mode
    assert image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "RGBA"])
def test_without_a_mode_the_image_stays_as_it_is(mode):
    image = ImageTransform(mode=None)(reader(encoded(Image.new(mode, (3, 2)))))
    assert (image.mode, image.size) == (mode, (3, 2))


@pytest.mark.parametrize(("mode", "shape"), [("RGB", (5, 7, 3)), ("L", (5, 7))])
def test_array_is_height_by_width_by_channels(mode, shape):
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    array = ImageTransform(mode=mode, as_="numpy")(reader(encoded(Image.fromarray(pixels))))
    assert (array.shape, array.dtype) == (shape, np.uint8)
    assert np.array_equal(array, pixels)
    array[0] = 0  # as in-place transforms do


def test_image_outlives_the_object(png):
    object = reader(png(7))
    image = ImageTransform()(object)
    object.close()
    assert image.getpixel((0, 0)) == (7, 7, 7)


def test_torchvision_is_given_the_image(png):
    tensor = ImageTransform(TO_TENSOR, mode="L")(reader(png(51)))
    assert tensor.shape == (1, 28, 28)
    assert torch.allclose(tensor, torch.tensor(0.2))


@pytest.mark.parametrize(
    "transform",
    [albumentations.InvertImg(p=1), albumentations.Compose([albumentations.InvertImg(p=1)])],
    ids=["alone", "composed"],
)
def test_albumentations_is_given_the_array_by_name(png, transform):
    array = ImageTransform(transform, as_="numpy")(reader(png(7)))
    assert np.array_equal(array, np.full((28, 28, 3), 248, np.uint8))


def test_any_other_callable_is_given_the_picture(png):
    assert ImageTransform(lambda image: image.size)(reader(png(size=9))) == (9, 9)
    assert ImageTransform(np.mean, mode="L", as_="numpy")(reader(png(7))) == 7


class Brightest:
    """A transform of somebody's module that merely begins like the name of the library."""

    __module__ = "albums.transforms"

    def __call__(self, picture):
        return int(np.max(picture))


def test_transform_of_a_module_with_a_similar_name_is_no_albumentation(png):
    assert ImageTransform(Brightest(), as_="numpy")(reader(png(7))) == 7


@pytest.mark.parametrize(
    ("transform", "as_"), [(None, "pil"), (TO_TENSOR, "pil"), (albumentations.InvertImg(p=1), "numpy")]
)
def test_copy_by_pickle_does_the_same(png, transform, as_):
    first = ImageTransform(transform, mode="L", as_=as_)
    second = pickle.loads(pickle.dumps(first))
    samples = [copy(reader(png(7))) for copy in (first, second)]
    ours, theirs = (sample.tobytes() if as_ == "pil" and transform is None else sample.tolist() for sample in samples)
    assert ours == theirs
    assert repr(second).startswith("ImageTransform(")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_and_labels_come_through_the_loader(png, workers):
    store = FakeStore({("mnist", f"train/{label}/{n}.png"): png(10 * label + n) for label in (0, 1) for n in range(4)})
    options = {"label": "parent", "transform": ImageTransform(TO_TENSOR, mode="L")}
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", store=store, **options) as dataset:
        context = "fork" if workers else None
        batches = list(DataLoader(dataset, batch_size=4, num_workers=workers, multiprocessing_context=context))
    assert [images.shape for images, _ in batches] == [(4, 1, 28, 28)] * 2
    pixels = torch.cat([images for images, _ in batches])[:, 0, 0, 0] * 255
    assert pixels.round().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("damage", "error"), [(lambda body: b"no image at all", UnidentifiedImageError), (lambda body: body[:-30], OSError)]
)
def test_corrupt_image_keeps_the_error_of_pil_and_names_the_object(damage, error, workers):
    body = encoded(Image.effect_noise((64, 64), 50))
    store = FakeStore({("mnist", "train/1.png"): damage(body)})
    dataset = CachedS3MapDataset.from_prefix("s3://mnist/", store=store, transform=ImageTransform())
    loader = DataLoader(dataset, num_workers=workers, multiprocessing_context="fork" if workers else None)
    raised = None
    with dataset:
        try:
            list(loader)
        except Exception as caught:
            raised = caught.with_traceback(None)  # whose frames would keep the worker
            raised.__cause__ = raised.__context__ = None
    assert type(raised) is error
    said = "\n".join([str(raised), *getattr(raised, "__notes__", ())])
    assert "while transforming s3://mnist/train/1.png" in said


def test_albumentations_get_arrays_without_being_told(png):
    sample = ImageTransform(albumentations.HorizontalFlip(p=1))(reader(png(7)))
    assert isinstance(sample, np.ndarray)


def test_missing_library_is_named_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setattr("asyncds.vision.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'asyncds\[vision\]'"):
        ImageTransform()
