"""Pictures become the arrays that transformers' own processors make of them, or are refused by name."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from transformers.image_utils import load_image

import edgeformer
from bench.sources import images as sweep
from edgeformer.errors import ExportError, InputError
from edgeformer.export import ExportOptions, export
from edgeformer.export.sources.hub.processors import image_settings
from edgeformer.processing.image import ImageSteps, pixels
from edgeformer.processing.image_file import read
from edgeformer.processing.resize import resize

NOISE = np.random.default_rng(0).integers(0, 256, (61, 83, 4), dtype=np.uint8)
SMALL = {"do_resize": True, "size": {"height": 32, "width": 32}}


def reading(settings, name="preprocessor_config.json"):
    """The `read` of a model's folder with this one file."""
    return lambda file: json.dumps(settings).encode() if file == name else None


def steps_of(settings, channels=3):
    """The runtime's steps, as the export writes them to a bundle."""
    return ImageSteps.of(json.loads(image_settings(reading(settings), channels)["preprocessor_config.json"]))


def reference(settings, item, tmp_path):
    """transformers' own array."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = tf.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    return np.asarray(processor(images=item, return_tensors="np")["pixel_values"])[0]


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("size", [(16, 16), (50, 31), (97, 201), (61, 40), (20, 83), (61, 83), (1, 200), (122, 7)])
def test_resizing_gives_pillows_bytes(size, resample):
    for shape in ((61, 83, 3), (300, 9, 3), (2, 2, 1)):
        array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        array[::2] = (array[::2] > 127) * np.uint8(255)  # overshoot is cut
        whole = Image.fromarray(array if shape[2] == 3 else array[..., 0]).resize(size[::-1], resample)
        assert np.array_equal(resize(array, size, resample), np.asarray(whole).reshape(*size, -1))


def test_an_unknown_filter_and_a_picture_without_width_are_refused():
    with pytest.raises(InputError, match="resample is 9"):
        resize(NOISE[..., :3], (4, 4), 9)
    with pytest.raises(InputError, match="too narrow"):
        resize(NOISE[..., :3], (4, 0), 2)


# ------------------------------------------------------------------------------------------------------------ settings

CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "crop_size": 32}
VIT = {"image_processor_type": "ViTImageProcessor", **SMALL}
HONOURED = {
    "defaults of the class": {"image_processor_type": "ConvNextImageProcessor"},
    "crop_pct with a crop": VIT | {"image_processor_type": "ConvNextImageProcessor", "size": 40, "crop_pct": 0.8},
    "crop_pct without a crop": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
    "crop_pct and crop_size": {"image_processor_type": "PoolFormerImageProcessor", "size": 40, "crop_pct": 0.7},
    "crop_pct of a square": {"image_processor_type": "PoolFormerImageProcessor", "size": {"height": 40, "width": 40}},
    "shortest edge and crop": CLIP,
    "a crop that is larger than the picture": CLIP | {"crop_size": {"height": 200, "width": 90}},
    "a longest edge": VIT | {"size": {"shortest_edge": 40, "longest_edge": 48}},
    "a longest edge that no picture reaches": VIT | {"size": {"shortest_edge": 40, "longest_edge": 9999}},
    "largest height and width": VIT | {"size": {"max_height": 40, "max_width": 60}},
    "an old size": VIT | {"size": 24},
    "no resizing": VIT | {"do_resize": False},
    "no rescaling": VIT | {"do_rescale": False},
    "no normalization": VIT | {"do_normalize": False},
    "another factor": VIT | {"rescale_factor": 1 / 127.5},
    "one mean": VIT | {"image_mean": 0.4, "image_std": 0.3},
    "padding": VIT | {"do_pad": True, "pad_size": {"height": 40, "width": 50}},
    "an offset": {"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True, "size": 32},
    "no second deviation": {"image_processor_type": "EfficientNetImageProcessor", "include_top": False, "size": 32},
    "BGR": {"image_processor_type": "MobileViTImageProcessor", "size": 40, "crop_size": 32},
    "RGB of a BGR class": {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": False},
    "a setting the class never reads": VIT | {"do_flip_channel_order": True, "crop_pct": 0.5, "anything": 1},
    "box": VIT | {"resample": 4},
    "hamming": VIT | {"resample": 5},
    "nearest": VIT | {"resample": 0},
    "lanczos": VIT | {"resample": 1},
    "alpha over white": CLIP | {"do_convert_rgb": True},
    "alpha dropped": CLIP | {"do_convert_rgb": False},
}


@pytest.mark.parametrize("settings", HONOURED.values(), ids=HONOURED)
def test_settings_give_the_numbers_of_transformers(settings, tmp_path):
    steps, rgba = steps_of(settings), Image.fromarray(NOISE)
    rgba.save(tmp_path / "file.png")
    # float32 arithmetic in the same order: at most the last bit of sums that are regrouped differs.
    items = [rgba.convert("RGB"), rgba.convert("RGB").rotate(90, expand=True), str(tmp_path / "file.png")]
    for item in items + ([rgba] if steps.over_white else []):
        expected = reference(settings, item, tmp_path)
        found = steps(read(item, over_white=steps.over_white))
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 2**-22 * max(1.0, np.abs(expected).max())


def test_one_channel_is_prepared_as_transformers_does(tmp_path):
    settings = VIT | {"image_mean": [0.4], "image_std": [0.2]}
    grey = Image.fromarray(NOISE[..., 0])
    expected = reference(settings, grey, tmp_path)
    assert np.abs(pixels(grey, steps_of(settings, channels=1), (1, 32, 32)) - expected).max() < 1e-6


REFUSED = {
    "size_divisor=8": {"image_processor_type": "Swin2SRImageProcessor"},
    "size_divisor=32": {"image_processor_type": "ViltImageProcessor"},
    "keep_aspect_ratio=True": {"image_processor_type": "DPTImageProcessor", "keep_aspect_ratio": True},
    "ensure_multiple_of=14": {"image_processor_type": "DPTImageProcessor", "ensure_multiple_of": 14},
    "patch_size=14": {"image_processor_type": "Qwen2VLImageProcessor"},
    "do_grayscale=True": {"image_processor_type": "SuperPointImageProcessor", "do_grayscale": True},
    "longest_edge": {"image_processor_type": "Idefics3ImageProcessor"},
    "input_data_format='channels_last'": VIT | {"input_data_format": "channels_last"},
    "resample": VIT | {"resample": 7},
    "NoSuchImageProcessor": {"image_processor_type": "NoSuchImageProcessor"},
    # Their settings are known ones; what they do with them is something else.
    "Owlv2ImageProcessor does not do what its settings say": {"image_processor_type": "Owlv2ImageProcessor"},
    "LevitImageProcessor does not do what its settings say": {"image_processor_type": "LevitImageProcessor"},
    "PerceiverImageProcessor does not do": {"image_processor_type": "PerceiverImageProcessor"},
    "expected \\[1, channels": {"image_processor_type": "VideoMAEImageProcessor"},
    "pixel_mask": {"image_processor_type": "MaskFormerImageProcessor", "size_divisor": 0},
}


@pytest.mark.parametrize(("named", "settings"), REFUSED.items(), ids=REFUSED)
def test_what_the_runtime_does_not_compute_is_refused_by_name(named, settings):
    with pytest.raises(ExportError, match=named):
        image_settings(reading(settings), 3)


def test_settings_that_fit_no_picture_of_the_model_are_refused():
    with pytest.raises(ExportError, match=r"takes no test image: .* 3 means or deviations for 1 channels"):
        image_settings(reading(VIT | {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}), 1)


@pytest.mark.parametrize(
    "named",
    [{"image_processor_type": "ViTImageProcessorFast"}, {"feature_extractor_type": "ViTFeatureExtractor"}],
    ids=str,
)
def test_older_names_of_a_class_are_known(named):
    assert steps_of(SMALL | named) == steps_of(SMALL | {"image_processor_type": "ViTImageProcessor"})


@pytest.mark.parametrize("name", ["do_resize", "do_rescale", "do_normalize"])
def test_a_setting_that_a_bundle_leaves_out_is_no_default(name):
    settings = json.loads(image_settings(reading(VIT), 3)["preprocessor_config.json"])
    assert ImageSteps.of(settings)
    del settings[name]
    with pytest.raises(InputError, match=name):
        ImageSteps.of(settings)


def test_the_sweep_tries_every_setting_of_every_image_processor():
    known = {key for kind in sweep.processors() for key in kind.valid_kwargs.__annotations__}
    assert known and known <= {setting.partition(" ")[0] for setting in sweep.settings()}


def test_a_bundle_has_every_setting_of_a_nested_config_and_gives_transformers_labels(tmp_path):
    torch.manual_seed(0)
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    model = tf.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "folder")
    nested = {"image_processor": VIT | {"image_mean": [0.1, 0.2, 0.3]}, "processor_class": "AnyProcessor"}
    (tmp_path / "folder" / "processor_config.json").write_text(json.dumps(nested))
    export(ExportOptions(str(tmp_path / "folder"), tmp_path / "bundle", quantize="none"))
    settings = json.loads((tmp_path / "bundle" / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == [0.1, 0.2, 0.3] and settings["do_normalize"] is True
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(NOISE[..., :3]).save(tmp_path / "rotated.png", exif=exif)
    expected = reference(nested["image_processor"], str(tmp_path / "rotated.png"), tmp_path)
    with torch.no_grad():
        shares = model(torch.from_numpy(expected)[None]).logits.softmax(-1)[0]
    (found,) = edgeformer.load(tmp_path / "bundle", engine="cpu").classify([tmp_path / "rotated.png"])
    assert {label.label: round(label.score, 4) for label in found} == {
        config.id2label[index]: round(float(share), 4) for index, share in enumerate(shares)
    }


# --------------------------------------------------------------------------------------------------------------- files


def odd(kind, path):
    """Saves a picture of that kind and returns its path."""
    rgba = Image.fromarray(NOISE)
    rgb = rgba.convert("RGB")
    palette = rgb.quantize(16)
    files = {
        "RGBA": (rgba, "png", {}),
        "LA": (rgba.convert("LA"), "png", {}),
        "L": (rgb.convert("L"), "png", {}),
        "L with a transparent value": (rgb.convert("L"), "png", {"transparency": 77}),
        "1 bit": (rgb.convert("1"), "png", {}),
        "palette": (palette, "png", {}),
        "palette with a transparent colour": (palette, "png", {"transparency": 3}),
        "palette with alphas": (palette, "png", {"transparency": bytes(range(0, 256, 16))}),
        "animated GIF": (palette, "gif", {"save_all": True, "append_images": [palette.rotate(90)], "transparency": 2}),
        "animated WebP": (rgb, "webp", {"save_all": True, "append_images": [rgb.rotate(9)], "lossless": True}),
        "CMYK JPEG": (rgb.convert("CMYK"), "jpg", {}),
        "CMYK TIFF": (rgb.convert("CMYK"), "tiff", {}),
        "YCbCr TIFF": (rgb.convert("YCbCr"), "tiff", {}),
    }
    image, suffix, more = files[kind]
    image.save(path.with_suffix(f".{suffix}"), **more)
    return path.with_suffix(f".{suffix}")


KINDS = ["RGBA", "LA", "L", "L with a transparent value", "1 bit", "palette", "palette with a transparent colour"]
KINDS += ["palette with alphas", "animated GIF", "animated WebP", "CMYK JPEG", "CMYK TIFF", "YCbCr TIFF"]


@pytest.mark.parametrize("kind", KINDS)
def test_odd_files_are_opened_as_transformers_opens_them(kind, tmp_path):
    path = odd(kind, tmp_path / "picture")
    assert np.array_equal(read(path), np.asarray(load_image(str(path))))
    plain = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_center_crop": False}
    for over_white in (False, True):
        settings = {"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": over_white, **plain}
        expected = reference(settings, str(path), tmp_path).transpose(1, 2, 0)
        assert np.array_equal(read(path, over_white=over_white), expected)
    with Image.open(path) as image:
        expected = reference(settings, image, tmp_path).transpose(1, 2, 0)
        assert np.array_equal(read(image, over_white=True), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(NOISE[..., :3]).save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(read(tmp_path / "photo.png"), np.asarray(load_image(str(tmp_path / "photo.png"))))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_not_silently_cut(suffix, tmp_path):
    image = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)
    image.save(tmp_path / f"deep.{suffix}")
    for item in (tmp_path / f"deep.{suffix}", image):
        with pytest.raises(InputError, match="I;16, more than 8 bits"):
            read(item)
    with pytest.raises(InputError, match="mode F, more than 8 bits"):
        read(Image.fromarray(NOISE[..., 0].astype(np.float32)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
def test_a_damaged_file_is_refused_by_its_name(suffix, tmp_path):
    path = tmp_path / f"whole.{suffix}"
    Image.fromarray(NOISE[..., :3]).save(path)
    content = path.read_bytes()
    for cut in (0, 1, 30, len(content) // 2):
        path.write_bytes(content[:cut])
        with pytest.raises(InputError, match=f"whole.{suffix} cannot be read as a picture"):
            read(path)
    with pytest.raises(InputError, match=r"nothing\.png cannot be read"):
        read(tmp_path / "nothing.png")


def test_a_decompression_bomb_is_refused(tmp_path):
    Image.new("L", (1, 1)).save(tmp_path / "bomb.bmp")
    content = bytearray((tmp_path / "bomb.bmp").read_bytes())
    content[18:26] = struct.pack("<ii", 60_000, 60_000)
    (tmp_path / "bomb.bmp").write_bytes(content)
    with pytest.raises(InputError, match=r"bomb\.bmp has more pixels than Pillow opens"):
        read(tmp_path / "bomb.bmp")


def test_arrays_are_right_or_refused():
    rgb = NOISE[..., :3]
    assert np.array_equal(read(rgb), rgb)
    assert np.array_equal(read(rgb[..., 0]), np.repeat(rgb[..., :1], 3, 2))
    assert np.array_equal(read(rgb, 1)[..., 0], np.asarray(Image.fromarray(rgb).convert("L"))) or (
        np.abs(read(rgb, 1)[..., 0].astype(int) - np.asarray(Image.fromarray(rgb).convert("L"))).max() <= 1
    )  # Pillow's weights have 16 bits
    alpha = NOISE[..., 3:] / 255
    expected = np.round(alpha * rgb + (1 - alpha) * 255).astype(np.uint8)
    assert np.array_equal(read(NOISE, over_white=True), expected)
    for item in (rgb / 255, rgb.astype(np.int64), rgb.transpose(2, 0, 1), rgb[None], rgb[:0], "", 3):
        with pytest.raises(InputError):
            read(item)
    with pytest.raises(InputError, match="alpha channel"):
        read(NOISE)


def test_a_picture_that_does_not_fit_the_graph_is_refused_with_both_sizes():
    steps = steps_of(VIT | {"size": {"shortest_edge": 32}})
    assert pixels(NOISE[:61, :61, :3], steps, (3, 32, 32)).shape == (3, 32, 32)
    with pytest.raises(InputError, match=r"\[32, 43\] after preprocessing, the graph takes \[32, 32\]"):
        pixels(NOISE[..., :3], steps, (3, 32, 32))
