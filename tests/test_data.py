"""Pictures, their geometry, and the data sets in their published layouts."""
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.io import savemat

from dml_common import pictures as data

BGR = {"resize": 256, "crop": 227, "channels": "BGR", "scale": 255, "mean": [104, 117, 128], "std": [1, 1, 1]}
RGB = {"resize": 256, "crop": 224, "channels": "RGB", "scale": 1, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
SQUARE = {**RGB, "resize": [299, 299], "crop": None}


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def torchvision_pipeline(preprocessing):
    """The papers' pipeline, written with torchvision."""
    from torchvision import transforms as t

    steps = [t.Resize(preprocessing["resize"])]
    if preprocessing["crop"]:
        steps.append(t.CenterCrop(preprocessing["crop"]))
    steps.append(t.ToTensor())
    if preprocessing["channels"] == "BGR":
        steps.append(lambda x: x.flip(0))
    if preprocessing["scale"] == 255:
        steps.append(lambda x: x * 255)
    return t.Compose([*steps, t.Normalize(preprocessing["mean"], preprocessing["std"])])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([BGR, RGB, SQUARE, {**RGB, "resize": 32, "crop": 61}]))
def test_preprocessing_is_torchvisions_bit_for_bit(width, height, preprocessing):
    if max(width, height) > 40 * min(width, height):
        width = height  # the resized picture would be huge; the next test has one
    file = io.BytesIO()
    noise(width, height).save(file, "png")
    expected = torchvision_pipeline(preprocessing)(Image.open(file).convert("RGB")).numpy()
    file.seek(0)
    got = data.load_picture(file, preprocessing)
    assert got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 30), (30, 20_000), (20_000, 1)])
def test_extreme_sizes(tmp_path, size):
    noise(*size).save(tmp_path / "a.png")
    picture = data.load_picture(tmp_path / "a.png", RGB)
    assert picture.shape == (3, 224, 224) and np.isfinite(picture).all()
    if 30 in size:
        np.testing.assert_array_equal(picture, torchvision_pipeline(RGB)(Image.open(tmp_path / "a.png")).numpy())


def test_thread_like_pictures_need_no_huge_intermediate(tmp_path, monkeypatch):
    noise(700, 60).save(tmp_path / "a.png")
    exact = data.load_pixels(tmp_path / "a.png", RGB).astype(int)
    monkeypatch.setattr(data, "LARGE", 1)
    assert np.abs(data.load_pixels(tmp_path / "a.png", RGB) - exact).max() <= 1


def test_kinds_of_pictures_become_rgb_as_documented(tmp_path):
    """Grey repeated, palette looked up, alpha dropped, CMYK without profile, 16 bits clipped, EXIF rotation ignored."""
    colour = noise(40, 30)
    whole = {**RGB, "resize": None, "crop": None}
    cases = {"grey.png": colour.convert("L"), "palette.png": colour.convert("P"), "cmyk.jpg": colour.convert("CMYK"),
             "grey_alpha.png": colour.convert("LA"), "one_bit.png": colour.convert("1")}
    for name, image in cases.items():
        image.save(tmp_path / name)
        expected = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        np.testing.assert_array_equal(data.load_pixels(tmp_path / name, whole), expected)
    grey = data.load_pixels(tmp_path / "grey.png", whole)
    assert (grey[..., 0] == grey[..., 2]).all()
    transparent = colour.convert("RGBA")
    transparent.putalpha(3)
    transparent.save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(data.load_pixels(tmp_path / "rgba.png", whole), np.asarray(colour))
    Image.fromarray(np.array([[0, 200, 255, 256, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert data.load_pixels(tmp_path / "deep.png", whole)[0, :, 1].tolist() == [0, 200, 255, 255, 255]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    colour.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(data.load_pixels(tmp_path / "turned.png", whole), np.asarray(colour))


def test_names_with_spaces_and_letters_beyond_ascii_and_beyond_utf8(tmp_path):
    names = ["ein Bild 10.png", "ein Bild 2.png", "zwölf ☃.PNG"]
    for name in names:
        noise(5, 5).save(tmp_path / name)
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        noise(5, 5).save(file, "png")
    dataset = data.open_dataset(tmp_path)
    assert dataset.relative[:2] == ["ein Bild 2.png", "ein Bild 10.png"]  # natural order
    assert len(dataset.paths) == 4 and len(data.pictures_sha256(dataset.relative)) == 64
    assert all(data.load_picture(path, RGB).shape == (3, 224, 224) for path in dataset.paths)


def test_natural_order_and_classes_from_subfolders(tmp_path):
    for name in ("c10/x2.jpg", "c10/x10.jpg", "c9/x1.jpg", ".hidden/y.jpg", "c9/.z.jpg", "c9/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        noise(4, 4).save(path, "jpeg")
    dataset = data.open_dataset(tmp_path)
    assert dataset.relative == ["c9/x1.jpg", "c10/x2.jpg", "c10/x10.jpg"]
    assert dataset.classes == ["c9", "c10"] and dataset.labels.tolist() == [0, 1, 1]
    assert dataset.name == tmp_path.name


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_unreadable_pictures_are_named(tmp_path, content):
    file = io.BytesIO()
    noise(200, 200).save(file, "jpeg")
    (tmp_path / "a.jpg").write_bytes(file.getvalue()[:2000] if content is None else content)
    with pytest.raises(ValueError, match=r"a\.jpg: can't be read as a picture"):
        data.load_picture(tmp_path / "a.jpg", RGB)


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch):
    noise(30, 30).save(tmp_path / "a.png")
    monkeypatch.setattr(data, "MAX_PIXELS", 899)
    with pytest.raises(ValueError, match="30 × 30 pixels"):
        data.load_picture(tmp_path / "a.png", RGB)


def test_draft_decoding_shrinks_large_jpegs_only(tmp_path):
    y, x = np.mgrid[:1600, :2000]
    smooth = np.stack([x / 8, y / 8, (x + y) / 16], axis=-1).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    exact, draft = (data.load_pixels(tmp_path / "a.jpg", RGB, draft).astype(int) for draft in (False, True))
    assert exact.shape == draft.shape and 0 < np.abs(exact - draft).max() < 8


def test_masks_go_through_the_pictures_geometry(tmp_path):
    mask = np.zeros((90, 150), dtype=np.uint8)
    mask[20:70, 40:100] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(np.repeat(mask[..., None], 3, axis=2)).save(tmp_path / "picture.png")
    through = data.load_mask(tmp_path / "mask.png", RGB)
    picture = data.load_pixels(tmp_path / "picture.png", RGB)[..., 0] > 127
    assert through.shape == (224, 224) and through.dtype == bool
    assert (through != picture).mean() < 0.01


def test_black_picture_is_a_black_file(tmp_path):
    Image.new("RGB", (300, 260)).save(tmp_path / "a.png")
    for preprocessing in (BGR, RGB, SQUARE):
        black = data.black_picture(preprocessing)
        np.testing.assert_array_equal(black, data.load_picture(tmp_path / "a.png", preprocessing))


def test_imports_without_torch():
    code = "import data, sys; assert not {'torch', 'scipy', 'torchvision'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(data.__file__).parent).returncode == 0


# ---------------------------------------------------------------- data sets


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(8, 8).save(path, "jpeg")


def annotations(rows, fields):
    """A MATLAB struct array as in the published files."""
    array = np.zeros((1, len(rows)), dtype=[(field, object) for field in fields])
    for i, row in enumerate(rows):
        array[0, i] = row
    return array


CARS = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class"]
NAMES = np.array([f"Car {i}" for i in range(1, 197)], dtype=object)[None]


@pytest.fixture
def cars(tmp_path):
    """cars_annos.mat and car_ims/: 6 pictures of classes 97 … 102."""
    rows = [(f"car_ims/{i:06d}.jpg", 1, 1, 5, 5, 96 + i, 0) for i in range(1, 7)]
    for row in rows:
        picture(tmp_path / "cars196" / row[0])
    savemat(tmp_path / "cars196" / "cars_annos.mat",
            {"annotations": annotations(rows, ["relative_im_path", *CARS, "test"]), "class_names": NAMES})
    return tmp_path


@pytest.fixture
def stanford(tmp_path):
    """torchvision's layout."""
    home = tmp_path / "stanford_cars"
    (home / "devkit").mkdir(parents=True)
    for part, place in (("train", home / "devkit" / "cars_train_annos.mat"), ("test", home / "cars_test_annos_withlabels.mat")):
        rows = [(1, 1, 5, 5, label, f"{i:05d}.jpg") for i, label in enumerate((98, 99, 150), 1)]
        for row in rows:
            picture(home / f"cars_{part}" / row[-1])
        savemat(place, {"annotations": annotations(rows, [*CARS, "fname"])})
    savemat(home / "devkit" / "cars_meta.mat", {"class_names": NAMES})
    return tmp_path


@pytest.fixture
def cub(tmp_path):
    home = tmp_path / "CUB_200_2011"
    names = ["100.Brown_Pelican/b 1.jpg", "101.White_Pelican/w1.jpg", "200.Common_Yellowthroat/y1.jpg"]
    for name in names:
        picture(home / "images" / name)
    (home / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    (home / "image_class_labels.txt").write_text("1 100\n2 101\n3 200\n")
    mask = tmp_path / "segmentations" / "101.White_Pelican" / "w1.png"
    mask.parent.mkdir(parents=True)
    Image.new("L", (8, 8), 204).save(mask)
    return tmp_path


@pytest.fixture
def sop(tmp_path):
    home = tmp_path / "sop" / "Stanford_Online_Products"
    header = "image_id class_id super_class_id path\n"
    lists = {"train": ["1 1 1 bicycle_final/1_0.JPG"], "test": ["2 11319 1 bicycle_final/2_0.JPG", "3 11320 12 toaster_final/3_0.JPG"]}
    for split, lines in lists.items():
        for line in lines:
            picture(home / line.split()[-1])
        (home / f"Ebay_{split}.txt").write_text(header + "".join(f"{line}\n" for line in lines))
    return tmp_path


def test_cars196(cars):
    dataset = data.open_dataset("cars196", cars)
    assert dataset.relative == [f"car_ims/{i:06d}.jpg" for i in (3, 4, 5, 6)]
    assert dataset.labels.tolist() == [98, 99, 100, 101] and dataset.classes[98] == "Car 99"
    assert "4 pictures of 4 classes, published are 8,131 of 98" in dataset.notes[0]
    assert len(data.open_dataset("cars196", cars, "train").paths) == 2
    assert len(data.open_dataset("cars196", cars, "all").paths) == 6
    assert len(data.open_dataset("cars196", cars / "cars196").paths) == 4  # the root may be the data set itself


def test_cars196_as_torchvision_has_it(stanford):
    dataset = data.open_dataset("cars196", stanford)
    assert dataset.relative == ["cars_train/00002.jpg", "cars_train/00003.jpg", "cars_test/00002.jpg", "cars_test/00003.jpg"]
    assert dataset.labels.tolist() == [98, 149, 98, 149]


def test_cub200_and_its_masks(cub):
    dataset = data.open_dataset("cub200", cub)
    assert dataset.relative == ["images/101.White_Pelican/w1.jpg", "images/200.Common_Yellowthroat/y1.jpg"]
    assert dataset.labels.tolist() == [100, 199] and dataset.classes[199] == "200.Common_Yellowthroat"
    assert dataset.masks[0].name == "w1.png" and dataset.masks[1] is None
    assert data.load_mask(dataset.masks[0], RGB).all()
    assert data.open_dataset("cub200", cub, "train").paths[0].name == "b 1.jpg"


def test_sop(sop):
    dataset = data.open_dataset("sop", sop)
    assert dataset.relative == ["bicycle_final/2_0.JPG", "toaster_final/3_0.JPG"]
    assert dataset.labels.tolist() == [11318, 11319]
    assert [dataset.super_classes[i] for i in dataset.super_labels] == ["bicycle", "toaster"]


def test_rendered_set(renders, tmp_path):
    dataset = data.open_dataset(renders)
    assert len(dataset.paths) == 600 and dataset.relative[17] == "images/000017.jpg"
    assert dataset.masks[17].name == "000017.png"
    inside = data.load_mask(dataset.masks[17], RGB).mean()
    assert 0.01 < inside < 0.9
    picture(tmp_path / "images" / "0.jpg")
    (tmp_path / "props.csv").write_text("frame,model\n0,a\n1,b\n")
    with pytest.raises(ValueError, match="1 of its 2 pictures are not in .*: 1"):
        data.open_dataset(tmp_path)


def test_table_of_pictures(tmp_path):
    for name in ("a 1.jpg", "sub/b.jpg", "c.jpg"):
        picture(tmp_path / name)
    table = tmp_path / "mine.csv"
    table.write_text("path,label,split\na 1.jpg,7,train\nsub/b.jpg,30,validation\nc.jpg,7,validation\n")
    dataset = data.open_dataset(table)
    assert dataset.name == "mine" and dataset.split == "validation" and "validation" in dataset.notes[0]
    assert dataset.relative == ["sub/b.jpg", "c.jpg"] and [dataset.classes[i] for i in dataset.labels] == ["30", "7"]
    assert data.open_dataset(table, split="train").relative == ["a 1.jpg"]
    assert len(data.open_dataset(table, split="all").paths) == 3
    for text, message in [("x,label\na,1\n", "no column path"), ("path\nnowhere.jpg\n", "1 of its 1 pictures"),
                          ("path,label\n,1\n", "line 2 has no path"), ("path,split\nc.jpg,train\n", "no row of split test")]:
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            data.open_dataset(table)


def test_data_root_from_the_environment(cars, monkeypatch):
    monkeypatch.setenv("DML_DATA_ROOT", str(cars))
    assert len(data.open_dataset("cars196").paths) == 4


def test_missing_data_sets_say_what_goes_where(tmp_path):
    for name, about in data.PUBLISHED.items():
        with pytest.raises(FileNotFoundError) as error:
            data.open_dataset(name, tmp_path)
        assert all(archive in str(error.value) and md5 in str(error.value) for archive, md5 in about["archives"].items())
    with pytest.raises(FileNotFoundError, match="did you mean cars196"):
        data.open_dataset("cars169", tmp_path)
    with pytest.raises(ValueError, match="no picture"):
        data.open_dataset(tmp_path)


def test_damaged_data_sets(cars, cub, sop):
    (cars / "cars196" / "car_ims" / "000004.jpg").unlink()
    (cars / "cars196" / "car_ims" / "000006.jpg").unlink()
    with pytest.raises(ValueError, match=r"2 of its 4 pictures .*000004.jpg, car_ims/000006.jpg$"):
        data.open_dataset("cars196", cars)
    place = cars / "cars196" / "cars_annos.mat"
    for content, message in [({"annotations": annotations([("a",)], ["name"])}, "without the field relative_im_path and class"),
                             ({"x": 1}, "no variable annotations"),
                             ({"annotations": np.zeros(3)}, "without the field")]:
        savemat(place, content)
        with pytest.raises(ValueError, match=message):
            data.open_dataset("cars196", cars)
    place.write_bytes(b"not a mat file")
    with pytest.raises(ValueError, match="MATLAB"):
        data.open_dataset("cars196", cars)
    (cub / "CUB_200_2011" / "image_class_labels.txt").write_text("1 100\n2 101\n")
    with pytest.raises(ValueError, match="2 labels for 3 pictures"):
        data.open_dataset("cub200", cub)
    (cub / "CUB_200_2011" / "image_class_labels.txt").write_text("1 100\n2 x\n3 200\n")
    with pytest.raises(ValueError, match="class 'x' is no number"):
        data.open_dataset("cub200", cub)
    (cub / "CUB_200_2011" / "image_class_labels.txt").unlink()
    with pytest.raises(FileNotFoundError, match="image_class_labels.txt: not there"):
        data.open_dataset("cub200", cub)
    (sop / "sop" / "Stanford_Online_Products" / "Ebay_test.txt").write_text("image_id class_id super_class_id path\n1 2\n")
    with pytest.raises(ValueError, match="line 2 has not 4 fields"):
        data.open_dataset("sop", sop)


def test_verify(cars, monkeypatch, capsys):
    (cars / "car_ims.tgz").write_bytes(b"x")
    lines = dict(data.verify("cars196", cars))
    assert any("md5 differs" in line for line in lines) and not all(lines.values())
    assert any("cars_annos.mat: md5 differs" in line for line in lines)
    assert any("2 pictures of 2 classes, 0 absent; cars196 train" in line for line in lines)
    monkeypatch.setattr(sys, "argv", ["data", "verify", "cars196", "--data-root", str(cars)])
    with pytest.raises(SystemExit) as end:
        data.main()
    assert end.value.code == 1 and "test in" in capsys.readouterr().out


def test_archives_never_write_outside(tmp_path, monkeypatch):
    def tgz(name, members):
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            for member in members:
                if isinstance(member, str):
                    item = tarfile.TarInfo(member)
                    item.size = 5
                    archive.addfile(item, io.BytesIO(b"hallo"))
                else:
                    archive.addfile(member)
        return tmp_path / name

    link = tarfile.TarInfo("inside")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    bad = [tgz("a.tgz", ["fine.txt", "../outside.txt"]), tgz("b.tgz", ["/tmp/absolute.txt"]), tgz("c.tgz", ["fine.txt", link])]
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("fine.txt", "hallo")
        archive.writestr("../outside.txt", "hallo")
    out = tmp_path / "out"
    for archive in [*bad, tmp_path / "d.zip"]:
        with pytest.raises(ValueError, match="refused"):
            data.unpack(archive, out)
        assert not out.exists() and not (tmp_path / "outside.txt").exists()
    good = tgz("CUB_200_2011.tgz", ["CUB_200_2011/images.txt"])
    monkeypatch.setattr(sys, "argv", ["data", "unpack", str(good), "--data-root", str(out)])
    with pytest.raises(ValueError, match="md5"):
        data.main()
    md5 = hashlib.md5(good.read_bytes()).hexdigest()
    monkeypatch.setitem(data.PUBLISHED["cub200"]["archives"], "CUB_200_2011.tgz", md5)
    data.main()
    assert (out / "cub200" / "CUB_200_2011" / "images.txt").read_text() == "hallo"
