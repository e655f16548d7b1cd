"""Pictures, their geometry, and the data sets in their published layouts."""
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from conftest import ROOT, full_disk, noise, python
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from published_sets import NAMES, annotations, make_cars, make_cub, make_sop, make_stanford
from scipy.io import savemat

from dml_common import pictures

BGR = {"resize": 256, "crop": 227, "channels": "BGR", "scale": 255, "mean": [104, 117, 128], "std": [1, 1, 1]}
RGB = {"resize": 256, "crop": 224, "channels": "RGB", "scale": 1,
       "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
SQUARE = {**RGB, "resize": [299, 299], "crop": None}
WHOLE = {**RGB, "resize": None, "crop": None}


def load_picture(path, preprocessing):
    """A picture as a network's input, float32 (3, H, W)."""
    return pictures.normalise(pictures.load_pixels(path, preprocessing), preprocessing)


def torchvision_pipeline(preprocessing):
    """The papers' pipeline, written with torchvision."""
    from torchvision import transforms as t

    interpolation = t.InterpolationMode(preprocessing.get("interpolation", "bilinear"))
    steps = [t.Resize(preprocessing["resize"], interpolation)]
    if preprocessing["crop"]:
        steps.append(t.CenterCrop(preprocessing["crop"]))
    steps.append(t.ToTensor())
    if preprocessing["channels"] == "BGR":
        steps.append(lambda x: x.flip(0))
    if preprocessing["scale"] == 255:
        steps.append(lambda x: x * 255)
    return t.Compose([*steps, t.Normalize(preprocessing["mean"], preprocessing["std"])])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400),
       st.sampled_from([BGR, RGB, SQUARE, {**RGB, "resize": 32, "crop": 61},
                        {**RGB, "interpolation": "bicubic"}, {**SQUARE, "interpolation": "lanczos"},
                        {**BGR, "interpolation": "nearest"}]))
def test_preprocessing_is_torchvisions_bit_for_bit(width, height, preprocessing):
    if max(width, height) > 40 * min(width, height):
        width = height  # the resized picture would be huge; the next test has one
    file = io.BytesIO()
    noise(width, height).save(file, "png")
    expected = torchvision_pipeline(preprocessing)(Image.open(file).convert("RGB")).numpy()
    file.seek(0)
    got = load_picture(file, preprocessing)
    assert got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 30), (30, 20_000), (20_000, 1)])
def test_extreme_sizes(tmp_path, size):
    noise(*size).save(tmp_path / "a.png")
    picture = load_picture(tmp_path / "a.png", RGB)
    assert picture.shape == (3, 224, 224) and np.isfinite(picture).all()
    if 30 in size:
        expected = torchvision_pipeline(RGB)(Image.open(tmp_path / "a.png")).numpy()
        np.testing.assert_array_equal(picture, expected)


def test_thread_like_pictures_need_no_huge_intermediate(tmp_path, monkeypatch):
    noise(700, 60).save(tmp_path / "a.png")
    exact = pictures.load_pixels(tmp_path / "a.png", RGB).astype(int)
    monkeypatch.setattr(pictures, "LARGE", 1)
    assert np.abs(pictures.load_pixels(tmp_path / "a.png", RGB) - exact).max() <= 1


def test_kinds_of_pictures_become_rgb_as_documented(tmp_path):
    """Grey repeated, palette looked up, alpha dropped, CMYK without profile, 16 bits cut, EXIF ignored."""
    def read(name, image, **settings):
        image.save(tmp_path / name, **settings)
        return pictures.load_pixels(tmp_path / name, WHOLE)

    colour = noise(40, 30)
    for name, mode in [("grey.png", "L"), ("palette.png", "P"), ("cmyk.jpg", "CMYK"), ("alpha.png", "LA"),
                       ("one_bit.png", "1")]:
        got = read(name, colour.convert(mode))
        np.testing.assert_array_equal(got, np.asarray(Image.open(tmp_path / name).convert("RGB")))
        assert name != "grey.png" or (got[..., 0] == got[..., 2]).all()
    transparent = colour.convert("RGBA")
    transparent.putalpha(3)
    np.testing.assert_array_equal(read("rgba.png", transparent), np.asarray(colour))
    deep = Image.fromarray(np.array([[0, 200, 255, 256, 65535]], dtype=np.uint16))
    assert read("deep.png", deep)[0, :, 1].tolist() == [0, 200, 255, 255, 255]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    np.testing.assert_array_equal(read("turned.png", colour, exif=exif), np.asarray(colour))


def test_natural_order_classes_from_folders_and_names_of_any_letters(tmp_path):
    names = ["c9/x1.jpg", "c10/1²3.jpg", "c10/zwölf ☃ '\".JPG", "c10/a\nb.jpg", "c10/x2.jpg", "c10/x10.jpg",
             f"c10/x{'1' * 200}.jpg", "c10/\udcff.jpg"]
    for name in [*names, ".hidden/y.jpg", "c9/.z.jpg", "c9/notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise(4, 4).save(tmp_path / name, "jpeg")
    dataset = pictures.open_dataset(tmp_path)
    assert sorted(dataset.relative) == sorted(names) and dataset.relative[0] == "c9/x1.jpg"
    assert [name[4:6] for name in dataset.relative if name[4] == "x"] == ["x2", "x1", "x1"]
    assert dataset.classes == ["c9", "c10"] and dataset.labels.tolist() == [0, 1, 1, 1, 1, 1, 1, 1]
    assert dataset.name == tmp_path.name and len(pictures.pictures_sha256(dataset.relative)) == 64
    assert all(load_picture(path, RGB).shape == (3, 224, 224) for path in dataset.paths)
    assert sorted(["a10", "a9", "a" + "9" * 5000], key=pictures.natural_key)[0] == "a9"


def test_unreadable_pictures_are_named(tmp_path, monkeypatch):
    file = io.BytesIO()
    noise(200, 200).save(file, "jpeg")
    for content in (b"", b"no picture", file.getvalue()[:2000]):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.jpg: can't be read as a picture"):
            load_picture(tmp_path / "a.jpg", RGB)
    noise(30, 30).save(tmp_path / "a.png")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 899)
    with pytest.raises(ValueError, match="30 × 30 pixels"):  # before it is decoded
        load_picture(tmp_path / "a.png", RGB)
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(ValueError, match="is a device or a pipe"):
            load_picture(tmp_path / name, RGB)


def test_draft_decoding_shrinks_large_jpegs_only(tmp_path):
    y, x = np.mgrid[:1600, :2000]
    smooth = np.stack([x / 8, y / 8, (x + y) / 16], axis=-1).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    exact = pictures.load_pixels(tmp_path / "a.jpg", RGB).astype(int)
    draft = pictures.load_pixels(tmp_path / "a.jpg", RGB, draft=True).astype(int)
    assert exact.shape == draft.shape and 0 < np.abs(exact - draft).max() < 8


def test_masks_go_through_the_pictures_geometry(tmp_path):
    mask = np.zeros((90, 150), dtype=np.uint8)
    mask[20:70, 40:100] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(np.repeat(mask[..., None], 3, axis=2)).save(tmp_path / "picture.png")
    through = pictures.load_mask(tmp_path / "mask.png", RGB)
    picture = pictures.load_pixels(tmp_path / "picture.png", RGB)[..., 0] > 127
    assert through.shape == (224, 224) and through.dtype == bool
    assert (through != picture).mean() < 0.01


def test_masks_of_all_kinds_are_read(tmp_path):
    """What is not background is object, however that is spelled."""
    object_ = np.zeros((8, 8), dtype=bool)
    object_[2:6, 3:7] = True
    one = object_.astype(np.uint8)
    palette, alpha = Image.fromarray(one * 3, "P"), Image.fromarray(np.full((8, 8, 4), 77, dtype=np.uint8))
    palette.putpalette([0, 0, 0, 9, 9, 9, 9, 9, 9, 0, 64, 0])
    alpha.putalpha(Image.fromarray(one * 200))
    inverted = Image.fromarray(one, "P")
    inverted.putpalette([255, 255, 255, 0, 0, 0])
    cases = {"0 and 255": one * 255, "0 and 1": one, "bool": object_, "index": one * 20,
             "16 bits": one * np.uint16(999), "red": one[..., None] * np.uint8([255, 0, 0]),
             "grey": np.repeat(one[..., None] * 200, 3, axis=2)}
    images = {name: Image.fromarray(array) for name, array in cases.items()}
    images |= {"palette": palette, "alpha": alpha}
    for name, image in images.items():
        image.save(tmp_path / "mask.png")
        np.testing.assert_array_equal(pictures.load_mask(tmp_path / "mask.png", WHOLE), object_, err_msg=name)
    inverted.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(pictures.load_mask(tmp_path / "mask.png", WHOLE), ~object_)
    coloured = np.uint8([[[64, 0, 0], [3, 0, 9]], [[0, 192, 0], [0, 0, 0]]])  # two objects, a JPEG's black
    Image.fromarray(coloured).save(tmp_path / "mask.png")
    assert pictures.load_mask(tmp_path / "mask.png").tolist() == [[True, False], [True, False]]
    Image.new("RGBA", (8, 8)).save(tmp_path / "mask.png")
    assert not pictures.load_mask(tmp_path / "mask.png", WHOLE).any()
    (tmp_path / "mask.png").write_bytes(b"no mask")
    with pytest.raises(ValueError, match="mask.png: can't be read as a mask"):
        pictures.load_mask(tmp_path / "mask.png", WHOLE)


def test_a_pictures_own_alpha_is_its_mask(tmp_path):
    object_ = np.arange(64).reshape(8, 8) % 5 < 2
    for opaque in (255, 90, 1):  # also where it is never more than half
        image = noise(8, 8)
        image.putalpha(Image.fromarray(np.uint8(opaque) * object_))
        image.save(tmp_path / "a.png")
        np.testing.assert_array_equal(pictures.load_mask(tmp_path / "a.png", WHOLE, alpha=True), object_)
    noise(8, 8).convert("RGBA").save(tmp_path / "a.png")
    assert pictures.load_mask(tmp_path / "a.png", WHOLE, alpha=True).all()  # opaque, whatever its colours
    noise(8, 8).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png: .*it is RGB, without an alpha channel"):
        pictures.load_mask(tmp_path / "a.png", WHOLE, alpha=True)


def test_black_picture_is_a_black_file(tmp_path):
    Image.new("RGB", (300, 260)).save(tmp_path / "a.png")
    for preprocessing in (BGR, RGB, SQUARE):
        black = pictures.black_picture(preprocessing)
        np.testing.assert_array_equal(black, load_picture(tmp_path / "a.png", preprocessing))


def test_imports_without_torch():
    done = python("import dml_common.pictures, sys; "
                  "assert not {'torch', 'scipy', 'torchvision'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- data sets


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(8, 8).save(path, "jpeg")


@pytest.fixture
def cars(tmp_path):
    make_cars(tmp_path, range(97, 103))
    return tmp_path


@pytest.fixture
def cub(tmp_path):
    make_cub(tmp_path / "CUB_200_2011", ["100.Brown_Pelican/b 1.jpg", "101.White_Pelican/w1.jpg",
                                         "200.Common_Yellowthroat/y1.jpg"])
    mask = tmp_path / "segmentations" / "101.White_Pelican" / "w1.png"
    mask.parent.mkdir(parents=True)
    Image.new("L", (8, 8), 204).save(mask)
    return tmp_path


@pytest.fixture
def sop(tmp_path):
    make_sop(tmp_path, train=[(1, 1, "bicycle_final/1_0.JPG")], test=[
        (11319, 1, "bicycle_final/2_0.JPG"), (11320, 12, "toaster_final/3_0.JPG")])
    return tmp_path


def test_cars196(cars, monkeypatch):
    dataset = pictures.open_dataset("cars196", cars)
    assert dataset.relative == [f"car_ims/{i:06d}.jpg" for i in (3, 4, 5, 6)]
    assert dataset.labels.tolist() == [98, 99, 100, 101] and dataset.classes[98] == "Car 99"
    assert "4 pictures of 4 classes, published are 8,131 of 98" in dataset.notes[0]
    assert len(pictures.open_dataset("cars196", cars, "train").paths) == 2
    assert len(pictures.open_dataset("cars196", cars, "all").paths) == 6
    assert len(pictures.open_dataset("cars196", cars / "cars196").paths) == 4  # the root may be the data set
    monkeypatch.setenv("DML_DATA_ROOT", str(cars))
    assert len(pictures.open_dataset("cars196").paths) == 4


def test_cars196_as_torchvision_has_it(tmp_path):
    make_stanford(tmp_path, train=(98, 99, 150), test=(98, 99, 150))
    dataset = pictures.open_dataset("cars196", tmp_path)
    assert dataset.relative == [f"cars_{part}/{i:05d}.jpg" for part in ("train", "test") for i in (2, 3)]
    assert dataset.labels.tolist() == [98, 149, 98, 149]


def test_cub200_and_its_masks(cub):
    dataset = pictures.open_dataset("cub200", cub)
    assert dataset.relative == ["images/101.White_Pelican/w1.jpg", "images/200.Common_Yellowthroat/y1.jpg"]
    assert dataset.labels.tolist() == [100, 199] and dataset.classes[199] == "200.Common_Yellowthroat"
    assert dataset.masks[0].name == "w1.png" and dataset.masks[1] is None
    assert pictures.load_mask(dataset.masks[0], RGB).all()
    assert pictures.open_dataset("cub200", cub, "train").paths[0].name == "b 1.jpg"


def test_sop(sop):
    dataset = pictures.open_dataset("sop", sop)
    assert dataset.relative == ["bicycle_final/2_0.JPG", "toaster_final/3_0.JPG"]
    assert dataset.labels.tolist() == [11318, 11319]
    assert [dataset.super_classes[i] for i in dataset.super_labels] == ["bicycle", "toaster"]


def test_rendered_set(renders, tmp_path):
    dataset = pictures.open_dataset(renders)
    assert len(dataset.paths) == 600 and dataset.relative[17] == "images/000017.jpg"
    assert dataset.masks[17].name == "000017.png"
    assert 0.01 < pictures.load_mask(dataset.masks[17], RGB).mean() < 0.9
    picture(tmp_path / "images" / "0.jpg")
    (tmp_path / "props.csv").write_text("frame,model\n0,a\n1,b\n")
    with pytest.raises(ValueError, match="images lacks 1 of the 2 pictures: 1;"):
        pictures.open_dataset(tmp_path)


@pytest.mark.parametrize("place", ["images/", ""])
def test_the_first_papers_own_rendered_set(tmp_path, place):
    for number in (1, 2, 10):
        picture(tmp_path / f"{place}{number:04d}.png")
    (tmp_path / "samples.csv").write_text("model,frame,rotation_z\na,10,0\nb,1,45\n")
    dataset = pictures.open_dataset(tmp_path)
    assert dataset.relative == [f"{place}0010.png", f"{place}0001.png"]
    assert "1 pictures are not in samples.csv" in dataset.notes[0]
    assert list(dataset.properties.items())[:2] == [("frame", ["10", "1"]), ("model", ["a", "b"])]
    labels, column = pictures.labels_of(dataset)
    assert labels.tolist() == [0, 1] and column == "model"


def test_table_of_pictures(tmp_path):
    for name in ("a 1.jpg", "sub/b.jpg", "c.jpg"):
        picture(tmp_path / name)
    table = tmp_path / "mine.csv"
    table.write_text("path,label,split\na 1.jpg,7,train\nsub/b.jpg,30,validation\nc.jpg,7,validation")
    dataset = pictures.open_dataset(table)
    assert dataset.name == "mine" and dataset.split == "validation" and "validation" in dataset.notes[0]
    assert dataset.relative == ["sub/b.jpg", "c.jpg"]
    assert [dataset.classes[i] for i in dataset.labels] == ["30", "7"]
    assert pictures.open_dataset(table, split="train").relative == ["a 1.jpg"]
    assert len(pictures.open_dataset(table, split="all").paths) == 3
    for text, message in [("x,label\na,1\n", "no column path"), ("path\nno.jpg\n", "1 of its 1 pictures"),
                          ("path,label\n,1\n", "line 2 has no path"),
                          ("path,split\nc.jpg,train\n", "no row of split test")]:
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            pictures.open_dataset(table)


def test_tables_of_other_tools(tmp_path):
    """The Hugging Face's metadata.csv, and Open Metric Learning's boxes, splits and columns of its own."""
    noise(30, 20).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,\"x, y\"\n")
    dataset = pictures.open_dataset(tmp_path / "metadata.csv")
    assert dataset.relative == ["a.png"] and dataset.classes == ["x, y"] and not dataset.notes
    table, header = tmp_path / "df.csv", "label,path,split,x_1,y_1,x_2,y_2,is_query,sequence\n"
    table.write_text(header + "1,a.png,valid,0,0,30,20,1,0\n2,a.png,dev,4,5,14,19.0,1,0\n")
    dataset = pictures.open_dataset(table)
    assert dataset.relative == ["a.png[0,0,30,20]", "a.png[4,5,14,19]"] and dataset.classes == ["1", "2"]
    assert dataset.split == "validation" and "not used: is_query, sequence" in dataset.notes[0]
    whole, part = (pictures.load_pixels(path, WHOLE) for path in dataset.paths)
    np.testing.assert_array_equal(part, whole[5:19, 4:14])
    np.testing.assert_array_equal(part, pictures.load_pixels(dataset.paths[1], WHOLE, draft=True))
    for box, message in (("0,0,31,20", "its box .* is not in its 30 × 20 pixels"), ("5,0,5,9", "its box")):
        table.write_text(f"{header}1,a.png,test,{box},1,0\n")
        with pytest.raises(ValueError, match=message):
            pictures.load_pixels(pictures.open_dataset(table).paths[0], WHOLE)
    table.write_text(f"{header}1,a.png,test,0,-1,x,9,1,0\n")
    with pytest.raises(ValueError, match="line 2: x_1, y_1, x_2, y_2 are 0, -1, x, 9; expected pixels"):
        pictures.open_dataset(table)
    table.write_text("path,label\na.png,1\na.png,NA\n")
    dataset = pictures.open_dataset(table)
    assert dataset.labels is None and "1 of its pictures have no label" in dataset.notes[0]


def test_folders_of_splits_and_stray_pictures(tmp_path):
    for name in ("train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/cat/4.jpg", "stray.jpg"):
        picture(tmp_path / name)
    dataset = pictures.open_dataset(tmp_path)
    assert dataset.split == "validation" and dataset.relative == ["val/cat/3.jpg", "val/cat/4.jpg"]
    assert dataset.classes == ["cat", "dog"] and dataset.labels.tolist() == [0, 0]
    assert "beside the classes' folders: stray.jpg" in dataset.notes[0]
    assert "validation is taken" in dataset.notes[1]
    assert pictures.open_dataset(tmp_path, split="train").relative == ["train/cat/1.jpg", "train/dog/2.jpg"]
    assert len(pictures.open_dataset(tmp_path, split="all").relative) == 4
    picture(tmp_path / "bus" / "cat" / "5.jpg")
    assert pictures.open_dataset(tmp_path).classes == ["bus", "train", "val"]  # no splits beside bus/
    picture(tmp_path / "stray2.jpg")
    dataset = pictures.open_dataset(tmp_path)
    assert dataset.classes is None and "no classes: 2 of 7 pictures lie beside them" in dataset.notes[0]


def test_links_are_followed_and_other_kinds_counted(tmp_path):
    picture(tmp_path / "p/cat/a.jpg")
    picture(tmp_path / "elsewhere/b.jfif")
    os.symlink(tmp_path / "elsewhere", tmp_path / "p/fox")
    os.symlink(tmp_path / "p/cat/a.jpg", tmp_path / "p/cat/link.jpe")
    noise(9, 9).save(tmp_path / "p/cat/c.jp2")
    for name in ("x.HEIC", "y.heic", "z.svg", "notes.txt"):
        (tmp_path / "p/cat" / name).touch()
    dataset = pictures.open_dataset(tmp_path / "p")
    assert dataset.relative == ["cat/a.jpg", "cat/c.jp2", "cat/link.jpe", "fox/b.jfif"]
    assert dataset.classes == ["cat", "fox"]
    assert dataset.notes[0].endswith("pictures of other kinds are left aside: 2 .heic, 1 .svg")
    os.symlink(tmp_path / "p", tmp_path / "elsewhere/loop")
    with pytest.raises(ValueError, match="p/fox/loop is a link to a folder above itself"):
        pictures.open_dataset(tmp_path / "p")
    os.symlink("self.png", tmp_path / "self.png")
    with pytest.raises(ValueError, match="self.png is a link to nothing, or to itself; remove it"):
        pictures.open_dataset(tmp_path)


def test_missing_data_sets_say_what_goes_where(tmp_path):
    for name, row in pictures.PUBLISHED.items():
        with pytest.raises(FileNotFoundError) as error:
            pictures.open_dataset(name, tmp_path)
        words = [row["source"], *(word for archive in row["archives"].items() for word in archive)]
        assert all(word in str(error.value) for word in words)
    with pytest.raises(FileNotFoundError, match="did you mean cars196"):
        pictures.open_dataset("cars169", tmp_path)
    with pytest.raises(ValueError, match="no picture"):
        pictures.open_dataset(tmp_path)


def test_damaged_data_sets(cars, cub, sop):
    def refused(name, root, path, content, message):
        path.write_text(content) if isinstance(content, str) else path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            pictures.open_dataset(name, root)

    labels = cub / "CUB_200_2011" / "image_class_labels.txt"
    for content, message in [
            ("1 100\n2 101\n", "2 labels for 3 pictures"), ("1 100\n2\n3 200\n", "line 2 has not 2 fields"),
            (b"1 100\n2 \xff\n", "line 2 is not UTF-8"), ("", "line 1 has not 2 fields"),
            *((f"1 100\n2 {word}\n3 200\n", "is no number from 1 on")
              for word in ("x", "0", "-1", "²", "٣", "1" + "0" * 9, "1" * 5000))]:
        refused("cub200", cub, labels, content, message)
    labels.unlink()
    with pytest.raises(ValueError, match="image_class_labels.txt does not exist; give it back: unpack"):
        pictures.open_dataset("cub200", cub)
    header = "image_id class_id super_class_id path\n"
    refused("sop", sop, sop / "sop/Stanford_Online_Products/Ebay_test.txt", header + "1 2\n",
            "line 2 has not 4 fields")
    for name in ("000004.jpg", "000006.jpg"):
        (cars / "cars196" / "car_ims" / name).unlink()
    with pytest.raises(ValueError, match=r"2 of its 4 pictures .*000004.jpg, car_ims/000006.jpg$"):
        pictures.open_dataset("cars196", cars)
    place, cell = cars / "cars196/cars_annos.mat", annotations([("a.jpg", 7)], ["relative_im_path", "class"])
    nested, expected = np.empty((1, 1), dtype=object), "expected a MATLAB file with (annotations|class_names)"
    nested[0, 0] = NAMES[:, :2]
    for content, message in [
            ({"annotations": annotations([("a",)], ["name"])}, expected), ({"x": 1}, expected),
            ({"annotations": np.zeros(3)}, expected), ({"annotations": cell}, expected),
            ({"annotations": cell[:, :0], "class_names": NAMES}, expected),
            ({"annotations": cell, "class_names": nested}, expected),
            ({"annotations": cell, "class_names": NAMES[:, :2]}, "classes up to 7, but 2 class names")]:
        file = io.BytesIO()
        savemat(file, content)
        refused("cars196", cars, place, file.getvalue(), message)
    refused("cars196", cars, place, b"not a mat file", expected)


# ---------------------------------------------------------------- python -m dml_common.pictures


def test_verify(cars, capsys):
    (cars / "car_ims.tgz").write_bytes(b"x")
    lines = dict(pictures.verify("cars196", cars))
    assert any("md5 differs" in line for line in lines) and not all(lines.values())
    assert any("cars_annos.mat: md5 differs" in line for line in lines)
    assert any("2 pictures of 2 classes, 0 absent; cars196 train" in line for line in lines)
    assert pictures.main(["verify", "cars196", "--data-root", str(cars)]) == 1
    assert "test in" in capsys.readouterr().out


def tgz(path, members):
    """An archive of names (of five bytes each) and TarInfos."""
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            item = tarfile.TarInfo(member) if isinstance(member, str) else member
            item.size = 5 if isinstance(member, str) else 0
            archive.addfile(item, io.BytesIO(b"hallo"))
    return path


def special(kind, target=""):
    item = tarfile.TarInfo("inside")
    item.type, item.linkname = kind, target
    return item


def zipped(path, names, change=lambda raw: raw, **attributes):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            item = zipfile.ZipInfo(name)
            item.external_attr = attributes.get("external_attr", 0)
            archive.writestr(item, "hallo")
    path.write_bytes(change(bytearray(path.read_bytes())))
    return path


def flagged(at_local, at_central, value):
    """A change of one byte in both headers of a zip archive's first member."""
    def change(raw):
        raw[at_local] = raw[raw.index(b"PK\x01\x02") + at_central] = value
        return raw
    return change


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python's tarfile has no data filter")
def test_archives_are_unpacked_whole_or_not_at_all(tmp_path):
    out = tmp_path / "a" / "out"
    number = iter(range(100))
    bad = [tgz(tmp_path / f"{next(number)}.tgz", members) for members in [
        ["fine.txt", "../outside.txt"], ["/tmp/absolute.txt"], ["a/../../outside.txt"],
        *(["fine.txt", special(kind, target)] for kind, target in [
            (tarfile.SYMTYPE, "/etc"), (tarfile.SYMTYPE, "fine.txt"), (tarfile.LNKTYPE, "/etc/passwd"),
            (tarfile.CHRTYPE, ""), (tarfile.FIFOTYPE, "")]),
        ["a", "a/b"], ["x" * 300], ["", "a"]]]
    bad += [zipped(tmp_path / f"{next(number)}.zip", names, **more) for names, more in [
        (["fine.txt", "../outside.txt"], {}), (["/tmp/absolute.txt"], {}), (["a", "a/b"], {}),
        (["l"], {"external_attr": 0o120777 << 16}),  # a link
        (["a"], {"change": flagged(6, 8, 1)}), (["a"], {"change": flagged(8, 10, 99)}),  # encrypted, unknown
        (["a"], {"change": lambda raw: raw.replace(b"hallo", b"hello")}),
        (["a"], {"change": lambda raw: raw[:60]})]]
    whole = tgz(tmp_path / "whole.tgz", [f"{i}.txt" for i in range(500)])
    for content in (whole.read_bytes()[:-100], b"", b"<html>"):
        bad.append(tmp_path / f"{next(number)}.tgz")
        bad[-1].write_bytes(content)
    for archive in bad:
        with pytest.raises(ValueError, match="refused, nothing was unpacked") as error:
            pictures.unpack(archive, out)
        assert str(error.value).startswith(str(archive))
        assert not out.parent.exists() and not (tmp_path / "outside.txt").exists(), archive
    item = tarfile.TarInfo("b")
    item.mode = 0o4777
    pictures.unpack(tgz(tmp_path / "good.tgz", ["a/1.txt", "a/1.txt", item]), out)
    assert (out / "a/1.txt").read_text() == "hallo" and not (out / "b").stat().st_mode & 0o6000
    pictures.unpack(zipped(tmp_path / "good.zip", ["c/1.txt"]), out)
    assert sorted(path.name for path in out.iterdir()) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="c is there already; remove it first"):
        pictures.unpack(zipped(tmp_path / "good.zip", ["c/2.txt"]), out)
    assert [path.name for path in (out / "c").iterdir()] == ["1.txt"]


def test_a_full_disk_leaves_nothing_unpacked(tmp_path):
    archive = tgz(tmp_path / "car_ims.tgz", ["car_ims/a.jpg"] * 20)
    with zipfile.ZipFile(tmp_path / "big.zip", "w", zipfile.ZIP_DEFLATED) as big:
        big.writestr("small/a", b"x")
        big.writestr("small/zeros", bytes(10**6))
    code = ("from dml_common import pictures\n"
            f"try: pictures.unpack({str(tmp_path / 'big.zip')!r}, {str(tmp_path / 'out')!r})\n"
            "except ValueError as error: print(error)")
    done = python(code, **full_disk(10**5))
    assert "nothing was unpacked: [Errno 27] File too large" in done.stdout, done.stderr
    assert sorted(tmp_path.iterdir()) == [tmp_path / "big.zip", archive]


def test_unpack_checks_the_archive_first(tmp_path, monkeypatch, capsys):
    archive = tgz(tmp_path / "CUB_200_2011.tgz", ["CUB_200_2011/images.txt"])
    command = ["unpack", "--data-root"]
    with pytest.raises(ValueError, match="md5 is not the published one"):
        pictures.main([*command, str(tmp_path / "out"), str(archive)])
    with pytest.raises(ValueError, match="expected one of car_ims.tgz"):
        pictures.main([*command, str(tmp_path / "out"), "other.tgz"])
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(pictures.PUBLISHED["cub200"]["archives"], "CUB_200_2011.tgz", md5)
    pictures.main([*command, str(tmp_path / "out"), str(archive)])
    assert (tmp_path / "out/cub200/CUB_200_2011/images.txt").read_text() == "hallo"
    done = subprocess.run([sys.executable, "-m", "dml_common.pictures", "unpack", tmp_path], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("pictures.py: ") and done.stderr.count("\n") == 1
