"""Miniatures of the papers' data sets and checkpoints, in the layouts in which they were published."""
import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from dml_common import networks

NAMES = np.array([[f"Car {i}" for i in range(1, 197)]], object)
TRIPLET = "cars_triplet46_reproduction0"
BOX = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"]


def draw(folder, named, size=(96, 64)):
    """A coloured rectangle on noise for every (class, name); the class sets its colour and place."""
    rng = np.random.default_rng(0)
    for label, name in named:
        pixels = rng.integers(90, 160, (size[1], size[0], 3))
        left = label * 7 % (size[0] - 40)
        pixels[16:48, left:left + 32] = [label * 37 % 256, label * 91 % 256, label * 53 % 256]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)


def annotations(rows, fields):
    """MATLAB's struct array as scipy reads the published files'."""
    array = np.empty((1, len(rows)), [(field, object) for field in fields])
    for i, row in enumerate(rows):
        array[0, i] = row
    return array


def make_cars(root, labels):
    """cars_annos.mat and car_ims/, with a picture for each label from 1 on."""
    named = [(label, f"car_ims/{i:06d}.jpg") for i, label in enumerate(labels, 1)]
    draw(root / "cars196", named)
    rows = [(name, 1, 1, 5, 5, label, int(label > 98)) for label, name in named]
    listed = annotations(rows, ["relative_im_path", *BOX, "class", "test"])
    savemat(root / "cars196" / "cars_annos.mat", {"annotations": listed, "class_names": NAMES})


def make_stanford(root, **halves):
    """Cars196 in torchvision's layout; the labels of train and of test."""
    home = root / "stanford_cars"
    (home / "devkit").mkdir(parents=True)
    for half, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        named = [(label, f"{i:05d}.jpg") for i, label in enumerate(halves[half], 1)]
        draw(home / f"cars_{half}", named)
        listed = annotations([(1, 1, 5, 5, *one) for one in named], [*BOX, "class", "fname"])
        savemat(home / file, {"annotations": listed})
    savemat(home / "devkit" / "cars_meta.mat", {"class_names": NAMES})


def make_cub(home, names):
    """images.txt, image_class_labels.txt and images/; names begin with their class."""
    draw(home / "images", [(int(name[:3]), name) for name in names])
    numbered = list(enumerate(names, 1))
    (home / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in numbered))
    (home / "image_class_labels.txt").write_text("".join(f"{i} {int(name[:3])}\n" for i, name in numbered))


def make_sop(root, **splits):
    """Ebay_train.txt, Ebay_test.txt and the super-classes' folders; lines (class, super-class, name)."""
    home = root / "sop" / "Stanford_Online_Products"
    for split, lines in splits.items():
        draw(home, [(label, name) for label, _, name in lines])
        rows = [f"{i} {label} {kind} {name}" for i, (label, kind, name) in enumerate(lines, 1)]
        text = "\n".join(["image_id class_id super_class_id path", *rows]) + "\n"
        (home / f"Ebay_{split}.txt").write_text(text)


def trunk_state(seed=0):
    """A BN-Inception state_dict with the published keys and shapes, random batch-norm statistics."""
    torch.manual_seed(seed)
    network = networks.bninception()
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    return {key: value.clone() for key, value in network.state_dict().items()}


def embedder_state(seed):
    torch.manual_seed(seed)
    layer = torch.nn.Linear(1024, 128)
    names = {"weight": layer.weight.detach(), "bias": layer.bias.detach()}
    return {f"{prefix}.{key}": value for prefix in ("net.0", "last_linear") for key, value in names.items()}


def publish(folder, trunk, embedder, fold=0, name=TRIPLET, number=""):
    """trunk_best.pth and embedder_best.pth where and as the published ones are."""
    place = folder / name / f"Test50_50_Partitions4_{fold}" / "saved_models"
    place.mkdir(parents=True, exist_ok=True)
    torch.save(trunk, place / f"trunk_best{number}.pth")
    torch.save(embedder, place / f"embedder_best{number}.pth")
    return place
