"""Arrays, tables and JSON in and out: what is wrong is refused in one line that names the file."""
import json
import os
import pickle
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import full_disk, python, saved

from dml_common import files

GOOD = np.arange(12, dtype=np.float32).reshape(4, 3)


def headed(text):
    """A .npy file with this header."""
    text = text.encode("latin1")
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + saved(GOOD)[128:]


def shaped(shape):
    return headed(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


WHOLE = saved(GOOD)
SHAPES = [f"({10**12}, 64)", f"({2**62}, 64)", f"({10**30}, 64)", "(-1, 3)", "(-4, -3)", f"({10**12}, 0)",
          "(True, True)", f"({'1,' * 60})", f"({'1,' * 100})", "(4.0, 3)", "(4, 3), 'x': 1"]
DTYPES = ["'<q9'", "5", "'|S2147483647'", "[('a','<f4',(1000000,))]", "'<f4',\0"]


@pytest.mark.parametrize("content", [
    b"", b"\x93", WHOLE[:6], WHOLE[:40], WHOLE[:128], WHOLE[:-1], b"1,2,3\n", b"PK\x03\x04",
    pickle.dumps(Evil()), saved(np.array([Evil()] * 4, dtype=object)), saved(GOOD.astype(np.complex64)),
    saved(GOOD.astype("datetime64[s]")), saved(GOOD.astype(str)), saved(np.zeros(4, [("a", "f4")])),
    saved(GOOD[0]), saved(GOOD[:0]), saved(GOOD[:, :0]), saved(GOOD[:1]),
    b"\x93NUMPY\x09\x00" + WHOLE[8:],
    b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + WHOLE[8:], headed("(" * 9000), headed("-" * 9000 + "1"),
    headed("__import__('os').system('touch evil')"), *map(shaped, SHAPES),
    *(headed(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': (4, 3)}}") for dtype in DTYPES)])
def test_what_is_no_embedding_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"^a\.npy") as error:
        files.open_embeddings("a.npy")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 and not (tmp_path / "evil").exists()


def test_arrays_stay_on_disk_and_say_what_is_wrong(tmp_path):
    np.save(tmp_path / "a.npy", GOOD)
    assert isinstance(files.read_array(tmp_path / "a.npy"), np.memmap)
    for content, message in [(saved(GOOD)[:-1], "truncated: its header promises more than 175 bytes"),
                             (saved(np.array([Evil()])), "Python objects, which could run code"),
                             (headed("(" * 9), "broken .npy header"), (b"PK\x03\x04", "zip archive"),
                             (b"abc", "is not a .npy file")]:
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            files.read_array(tmp_path / "a.npy")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, target in (("device", "/dev/zero"), ("loop", "loop"), ("dangling", "nowhere")):
        os.symlink(target, tmp_path / name)
    (tmp_path / "folder").mkdir()
    for name, message in {"pipe": "a device or a pipe", "device": "a device or a pipe",
                          "loop": "can't be opened", "dangling": "does not exist", "folder": "is a folder",
                          "x" * 5000: "can't be opened", "a\0b": "can't be opened"}.items():
        for read in (files.read_array, files.read_table, files.read_json, files.check_input, files.read_text):
            with pytest.raises(ValueError, match=message):
                read(tmp_path / name)


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("text", [
    "frame,a,b\n0,x,1\n1,ü,2\n", "\ufefframe,a,b\r\n0,x,1\r\n1,ü,2\r\n\r\n", 'frame, a ,b\n0,"x", 1\n1,ü,2'])
def test_tables(tmp_path, text):
    (tmp_path / "t.csv").write_text(text.replace("\ufefframe", "\ufeffframe"), encoding="utf-8", newline="")
    assert files.read_table(tmp_path / "t.csv") == {"frame": ["0", "1"], "a": ["x", "ü"], "b": ["1", "2"]}
    properties = files.read_properties(tmp_path / "t.csv")
    assert list(properties) == ["a", "b"] and properties["a"].tolist() == ["x", "ü"]


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b"\xef\xbb\xbf \n\n", "is empty"), (b"frame,a\n", "no rows"),
    (b"frame;a\n0;1\n", "no comma"), (b"a,a\n1,2\n", "two columns are named 'a'"),
    (b"a,\n1,2\n", "column 2 has no name"), (b"0,1\n2,3\n", "is data"),
    (b"a,b\n1,2\n3\n", "line 3 has 1 field, the header 2"), (b"a,b\n1,2,3\n", "line 2 has 3 fields"),
    (b'a,b\n1,"2\n', "line 2: "), (b'a,b\n1,"2"3\n', "line 2: "), (b"a,b\n1,\0\n", "line 2 has a NUL"),
    (b"a,b\n1,2\n3,\xe9\n", "line 3 is not UTF-8"), ("a,b\n1,2\n".encode("utf-16"), "line 1 is not UTF-8"),
    (WHOLE, r"is an array \(4, 3\) of float32; expected a CSV"), (saved(GOOD[:, 0]), "expected a CSV file"),
    (b",".join(b"c%d" % i for i in range(10**5)) + b"\n", "100,000 columns")])
def test_bad_tables(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"t.csv.*{message}"):
        files.read_table(tmp_path / "t.csv")


def test_labels_in_an_array_and_the_index_of_pandas(tmp_path):
    for labels, values in [(np.array([2, 1]), ["2", "1"]), (np.array([True, False]), ["True", "False"]),
                           (np.array(["ü ", "b"]), ["ü", "b"]), (np.array([b"x", b"y"]), ["x", "y"])]:
        np.save(tmp_path / "mine.npy", labels)
        assert files.read_table(tmp_path / "mine.npy") == {"mine": values}
        assert files.read_properties(tmp_path / "mine.npy")["mine"].tolist() == values
        assert files.read_properties(tmp_path / "mine.npy", ["class"])["class"].tolist() == values
    for text in (",a\n0,x\n1,y\n", "Unnamed: 0,a\n0,x\n1,y\n", "index,a\n7,x\n3,y\n", ",a\n7,x\n3,y\n"):
        (tmp_path / "t.csv").write_text(text)
        assert list(files.read_properties(tmp_path / "t.csv")) == ["a"]
    assert files.read_table(tmp_path / "t.csv") == {"index": ["7", "3"], "a": ["x", "y"]}  # was shuffled
    (tmp_path / "t.csv").write_text(",file_name,a\n7,q.jpg,x\n3,p.jpg,y\n")  # part of a table
    assert files.read_properties(tmp_path / "t.csv", None, ["p.jpg", "q.jpg"])["a"].tolist() == ["y", "x"]


def test_missing_values_are_spelled_in_many_ways(tmp_path):
    (tmp_path / "t.csv").write_text("frame,n,word\n1,1,None\n2,,a\n3,nan,NA\n4,None,N/A\n5,2.5,null\n"
                                    "6,NaN,?\n")
    read = files.read_properties(tmp_path / "t.csv", missing=files.MISSING)
    assert read["n"].tolist() == ["1", "", "", "", "2.5", ""]
    assert read["word"].tolist() == ["None", "a", "", "", "", "?"]
    read = files.read_properties(tmp_path / "t.csv", ["word"], missing=["?"])
    assert read["word"].tolist() == ["None", "a", "NA", "N/A", "null", ""]


def test_numbers_spelled_in_several_ways_are_noted(tmp_path):
    (tmp_path / "t.csv").write_text("frame,a,b,c\n1,1,x,0.5\n2,1.0,1,1\n3,01,1.0,2\n")
    files.read_properties(tmp_path / "t.csv", pictures=["1", "2", "3"], notes=(notes := []))
    assert len(notes) == 1 and "column 'a' spells one number in several ways" in notes[0]


NAMED = ["images/000010.jpg", "images/000002.jpg", "images/000000.png"]


@pytest.mark.parametrize("names, how", [
    (["images/000002.jpg", "images/000000.png", "images/000010.jpg"], "path"),
    ([r".\images\000002.jpg", "./images/000000.png", "images/000010.jpg"], "path"),
    (["/home/me/000002.jpg", "000000.png", "x/000010.jpg"], "file name"),
    (["000002", "000000", "000010"], "stem"), (["2", "0", "0010"], "number")])
def test_rows_are_matched_by_name(tmp_path, names, how):
    text = "".join(f"{name},{name.replace(chr(92), '/')[-6:]}\n" for name in [*names, "other/77.jpg"])
    (tmp_path / "t.csv").write_text("frame,a\n" + text)
    notes = []
    read = files.read_properties(tmp_path / "t.csv", pictures=NAMED, notes=notes)
    assert read["a"].tolist() == [names[row][-6:] for row in (2, 0, 1)]
    assert f"3 rows matched by {how}; 3 were in another place, 1 belong to no picture" in notes[0]
    files.rows_by_name(names, names, "t.csv", notes)
    assert len(notes) == 1  # nothing to say where all is in place


def test_tables_of_boxes_fit_their_pictures(tmp_path):
    """As Open Metric Learning has them: the label first, and a box that embed.py makes part of the name."""
    (tmp_path / "t.csv").write_text("label,path,x_1\n5,a.jpg,1\n6,b.jpg,2\n7,c.jpg,3\n")
    read = files.read_properties(tmp_path / "t.csv", ["label"], ["c.jpg[3,0,9,9]", "a.jpg[1,0,9,9]"])
    assert read["label"].tolist() == ["7", "5"]


def test_names_that_do_not_fit_are_refused(tmp_path):
    for names, message in [(["2", "0", "11"], "lacks 1 of the 3 pictures: images/000010.jpg; add"),
                           (["2", "2", "0", "10"], "2 is the name of two"),
                           (["x", "y", "z"], "lacks 3 of the 3")]:
        with pytest.raises(ValueError, match=f"t.csv:? {message}"):
            files.rows_by_name(NAMED, names, "t.csv")
    with pytest.raises(ValueError, match="a.jpg is the name of two"):
        files.rows_by_name(["a.jpg", "a.jpg"], ["a.jpg", "b.jpg"], "t.csv")
    for index in (["0", "1"], ["7", "12"]):
        assert files.rows_by_name(["a.jpg", "b.jpg"], index, "t.csv", notes := []).tolist() == [0, 1]
        assert "rows are taken in their order" in notes[0]
    with pytest.raises(ValueError, match="lacks 2 of the 2"):  # a table that was shuffled
        files.rows_by_name(["a.jpg", "b.jpg"], ["12", "7"], "t.csv")
    for pictures, text, why in [(None, "frame,a\nx.jpg,x\n", "the array's pictures"),
                                (["1"], "b,a\n1,x\n", "its rows")]:
        (tmp_path / "t.csv").write_text(text)
        files.read_properties(tmp_path / "t.csv", ["a"], pictures, notes := [])
        assert f"rows are taken in their order: {why} are not known by name" in notes[0]
    (tmp_path / "t.csv").write_text("frame,a\n1,x\n2,y\n")  # an index names nothing
    files.read_properties(tmp_path / "t.csv", ["a"], None, notes := [])
    assert not notes


def test_an_array_knows_its_pictures(tmp_path):
    folder = tmp_path / "results" / "cars" / "triplet" / "fold0"
    folder.mkdir(parents=True)
    np.save(folder / "emb.npy", GOOD)
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]

    def known(listed, part, **options):
        about = {"pictures": {"sha256": files.pictures_sha256(part), **listed}, "options": options}
        (folder / "emb.json").write_text(json.dumps(about))
        return files.picture_names(folder / "emb.npy")

    assert files.picture_names(folder / "emb.npy") is None
    (tmp_path / "results/cars/labels.csv").write_text("path\n" + "\n".join(names))
    assert known({}, names[:4], limit=4) == names[:4]
    picked = ["e.jpg", "b.jpg", "a.jpg", "c.jpg"]
    assert known({}, picked, pick=[4, 1, 0, 2]) == picked
    assert known({"left_out": ["c.jpg"]}, names[:2] + names[3:]) == ["a.jpg", "b.jpg", "d.jpg", "e.jpg"]
    assert known({}, names[1:]) is None  # of another list
    (folder / "emb.labels.csv").write_text("path,class\n" + ",0\n".join(names[1:]) + ",0\n")
    assert known({}, names[1:]) == names[1:]
    (folder / "emb.json").unlink()
    assert files.picture_names(folder / "emb.npy") == names[1:]


def test_properties_that_are_not_there(tmp_path):
    for text, names, message in [
            ("frame,a\n0,\n", None, r"row 0 .*'a' has no value"), ("id\n0\n", None, "only the"),
            ("frame,a\n0,1\n", ["b"], "no property 'b'; it has a")]:
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            files.read_properties(tmp_path / "t.csv", names)
    assert list(files.read_properties(tmp_path / "t.csv", ["a", "a"])) == ["a"]


def test_the_table_beside_an_array(tmp_path):
    array = tmp_path / "cars" / "triplet" / "fold0" / "emb.npy"
    array.parent.mkdir(parents=True)
    expected = f"no table of its pictures with a column a .{array.parent}/labels.csv"
    with pytest.raises(FileNotFoundError, match=expected):
        files.table_beside(array, "a")
    for place, column in ((tmp_path / "cars" / "labels.csv", "a"), (tmp_path / "cars" / "props.csv", "b"),
                          (array.parent / "emb.labels.csv", "b"), (array.parent / "emb.labels.csv", "a")):
        place.write_text(f"path,{column}\n0,1\n")
        found = files.table_beside(array, "a")
        assert found == (place if column == "a" else tmp_path / "cars" / "labels.csv")
    assert files.table_beside(array) == tmp_path / "cars" / "props.csv"


# ---------------------------------------------------------------- JSON


def test_the_json_beside_an_array(tmp_path):
    assert files.read_sidecar(tmp_path / "emb.npy") == {}
    about = {"dataset": "cars", "loss": None, "fold": 0, "split": "test", "rows": [1, 2], "mine": [{}, None],
             "preprocessing": {"resize": [8, 8], "crop": None, "mean": [0.5, 1, 2]},
             "options": {"pick": None}, "pictures": {"number": 2, "sha256": "x", "left_out": ["\udcff.jpg"]}}
    (tmp_path / "emb.json").write_text(json.dumps(about))
    assert files.read_sidecar(tmp_path / "emb.npy") == about


@pytest.mark.parametrize("content, message", [
    *((content, "no JSON") for content in (b"", b'{"dataset": "x", ', b"<html>", b"[" * 10**5)),
    *((content, "expected an object") for content in (b"[]", b"null", b'"x"', b"5", b'{"pictures": null}')),
    (b'{"a": "\xff"}', "not UTF-8"), (b"\0", "NUL"), (b'{"seed": Infinity}', "Infinity is no JSON"),
    (b'{"seed": 1%s}' % (b"0" * 10**4), "seed|digits"), (b'{"seed": 1%s}' % (b"0" * 30), "seed: 1000"),
    (b'{"fold": true}', "fold: True, expected a whole number or a text or null"),
    (b'{"pictures": {}, "pictures": []}', "the key 'pictures' stands there twice"),
    (b'{"rows": "all"}', "rows: 'all', expected a list"),
    (b'{"pictures": {"left_out": [7]}}', "pictures: left_out: 0: 7, expected a text"),
    (b'{"options": {"pick": "x"}}', "options: pick: 'x', expected a list or null"),
    (b'{"preprocessing": {"resize": "a"}}', "resize: 'a', expected a whole number or a list or null"),
    (b'{"preprocessing": {"interpolation": 3}}', "interpolation: 3, expected a text"),
    (b'{"loss": "\\ud800"}', "loss: .*expected a text")])
def test_bad_json(tmp_path, content, message):
    (tmp_path / "emb.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"emb\.json: .*({message})") as error:
        files.read_sidecar(tmp_path / "emb.npy")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


# ---------------------------------------------------------------- out


def test_outputs_replace_plain_files_that_are_no_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.csv").write_text("in")
    os.link("in.csv", "hard.csv")
    os.symlink("in.csv", "link.csv")
    (tmp_path / "old.csv").touch()
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    inputs, others = ["in.csv", None, "missing.csv", "a/b/c/emb.npy"], ["other.csv", None]
    (tmp_path / "a/b/c").mkdir(parents=True)
    for name in ("new.csv", "old.csv", "./new.csv/../old.csv"):
        files.check_output(name, inputs, others)
    for name, message in [
            ("in.csv", "is an input"), ("hard.csv", "is an input"), ("link.csv", "is an input"),
            ("./x/../in.csv", "is an input"), ("missing.csv", "or another output"), ("", "no name"),
            ("a/b/c/emb.json", "is an input"), ("a/labels.csv", "is an input"),  # which are read with emb.npy
            ("./other.csv", "the name of two outputs"),
            (".", "no name"), (tmp_path, "is a folder"), ("/dev/null", "a device or a pipe"),
            ("pipe", "a device or a pipe"), ("loop", "can't be opened"), ("no/x.csv", "does not exist")]:
        with pytest.raises(ValueError, match=message):
            files.check_output(name, inputs, others)
    for name in ("pipe", "loop"):
        with pytest.raises(ValueError):
            files.write_file(name, b"x")
    assert not os.path.isfile("pipe") and os.path.islink("loop") and not [*tmp_path.glob(".*")]


def test_files_are_written_whole_with_the_rights_of_new_files(tmp_path):
    os.symlink("far.csv", tmp_path / "link.csv")
    files.write_table(tmp_path / "link.csv", ["a", "b"], [[1 / 3, None], ["\udcff", "x,y"]])
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "far.csv").read_bytes() == b'a,b\n0.3333333333333333,\n\xff,"x,y"\n'
    odd = ["new\nline", "carriage\rreturn", "q\"uo'te", "🚗 1²3", "tab\tx"]
    files.write_table(tmp_path / "odd.csv", ["path", "n"], [[name, 1] for name in odd])
    assert files.read_table(tmp_path / "odd.csv")["path"] == odd
    (tmp_path / "odd.csv").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far.csv", "link.csv"]
    os.umask(mask := os.umask(0))
    assert (tmp_path / "far.csv").stat().st_mode & 0o777 == 0o666 & ~mask


def test_an_array_gets_its_name_when_it_is_full(tmp_path):
    path = tmp_path / "a[1].npy"
    with pytest.raises(KeyboardInterrupt), files.new_array(path, (2, 3)) as array:
        array[0] = 1
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with files.new_array(path, (2, 3), "float16") as array:
        array[:] = 7
        assert not path.exists()
    assert np.load(path).tolist() == [[7] * 3] * 2 and len(list(tmp_path.iterdir())) == 1


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    code = ("import os, sys\nfrom dml_common import files\n"
            f"with files.part_of({str(tmp_path / 'x.csv')!r}) as part:\n"
            "    print(flush=True)\n    sys.stdin.readline()")

    def start():
        process = subprocess.Popen([sys.executable, "-c", code], cwd=files.ROOT, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE)
        process.stdout.readline()
        return process

    killed, alive = start(), start()
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.glob(".x.csv.*.part"))) == 2
    (tmp_path / ".x.csv2.abc.part").touch()
    files.write_file(tmp_path / "x.csv", b"mine")
    assert len(list(tmp_path.glob(".x.csv.*.part"))) == 1  # of the one that is at work
    alive.communicate(b"\n")
    assert alive.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.csv2.abc.part", "x.csv"]


def test_processes_that_write_one_file_at_once_all_succeed(tmp_path):
    code = ("from dml_common import files\n"
            f"for i in range(300): files.write_file({str(tmp_path / 'x.csv')!r}, b'same')")
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=files.ROOT) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


def test_a_full_disk_leaves_what_there_was(tmp_path):
    """A file-size limit stands for the full disk: the write fails midway, for real."""
    code = ("from dml_common import files\n"
            f"try: files.write_file({str(tmp_path / 'x.csv')!r}, bytes(2000))\n"
            "except OSError as error: print(error)")
    for there in ({}, {"x.csv": "earlier"}):
        done = python(code, **full_disk(1000))
        assert re.search(r"x.csv can't be written \(.*\); free space", done.stdout)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == there
        (tmp_path / "x.csv").write_text("earlier")


def test_every_output_goes_through_this_room():
    """What is tried here of full disks, killed processes and odd names holds for every script."""
    alone = {"setup.py", "render_cars.py", "files.py", "rowfile.py"}  # the last two are tried by themselves
    for path in [*files.ROOT.glob("*.py"), *files.ROOT.glob("dml_common/*.py")]:
        opened = re.findall(r'open\((?!os.devnull)[^)]*, "[wax].*|\bnp\.save\(.*|\.write_(?:text|bytes)\(.*',
                            path.read_text(encoding="utf-8"))
        assert path.name in alone or not opened, (path, opened)
