"""Speed of embed.py against the bare forward pass: same network, batch, device, threads, tensors in memory.

    python benchmarks/embed.py --dataset ../shared/renders
    python benchmarks/embed.py --dataset ../shared/renders --model bninception --repeat 4 --precision bf16
    python benchmarks/embed.py --dataset ../shared/renders --model bninception --repeat 40 --device cuda

The first row is of a picture: the whole command from main() to its end (listing, loading the network,
hashing, decoding, writing, renaming), its floor the bare passes before and after it, medians of --rounds.
The others are processes of their own with 100 and 400 pictures: does memory grow? bninception and
inception_v3 get random weights where the real ones are not at hand: they take the same time. Asserts nothing.
"""
import os
import tempfile
import time
from pathlib import Path

import torch
from measure import measured, print_header, print_table, script, typical

import embed
from dml_common import command, networks, pictures


def bare(module, preprocessing, batch, device, args):
    """The cost a picture of the forward pass alone, in embed.py's memory layout."""
    shape = (batch, *pictures.input_size(preprocessing), 3)
    given = networks.to_input(torch.randint(0, 256, shape, dtype=torch.uint8).to(device), preprocessing)
    embed.embed(module, given, args.precision)

    def passes():
        stop, done = time.perf_counter() + args.seconds, 0
        while time.perf_counter() < stop or not done:
            embed.embed(module, given, args.precision)
            done += batch
        return done

    cost, done = measured(passes, device)
    return cost.each(done)


def whole(arguments, n, device):
    """(Cost, decodes) a picture of embed.main()."""
    decodes, read = [0], pictures.load_pixels

    def counted(*rest):
        decodes[0] += 1
        return read(*rest)

    pictures.load_pixels = counted
    cost, _ = measured(lambda: embed.main([str(argument) for argument in arguments]), device)
    pictures.load_pixels = read
    return cost.each(n), decodes[0] / n


def repeat(paths, times, folder):
    """A folder with every picture `times` times (links), so that a small set makes a long run."""
    folder.mkdir()
    for copy in range(times):
        for number, path in enumerate(paths):
            os.symlink(path.resolve(), folder / f"{copy:03d}_{number:06d}{path.suffix}")
    return folder


def main():
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--dataset", required=True, help="a folder of pictures or a rendered set")
    add("--model", default="efficientnet_lite0")
    add("--repeat", type=int, default=1, metavar="N", help="take every picture N times (1)")
    add("--pictures", type=int, metavar="N", help="the first N (all)")
    add("--seconds", type=float, default=5, help="of each bare measurement (5)")
    add("--rounds", type=int, default=3, help="alternations of bare and whole (3)")
    add("--batch", type=int, help="as embed.py chooses")
    add("--workers", type=int, default=None)
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add("--precision", default="fp32", choices=["fp32", "tf32", "bf16"])
    args = parser.parse_args()
    device = command.torch_device(args.device, args.precision)
    paths = pictures.open_dataset(args.dataset).paths[:args.pictures]
    with tempfile.TemporaryDirectory() as name:
        folder, weights = Path(name), []
        every = repeat(paths, args.repeat, folder / "pictures")
        if args.model in networks.WEIGHTS and not networks.hub_file(args.model).is_file():
            torch.save(networks.BACKBONES[args.model]().state_dict(), folder / "weights.pth")
            weights = ["--weights", folder / "weights.pth"]
        network = networks.load(networks.find(model=args.model, weights=weights[1] if weights else None)[0])
        module, preprocessing = network.module.to(device), network.preprocessing
        black = torch.from_numpy(pictures.black_picture(preprocessing))[None].to(device)
        batch = args.batch or embed.batch_size(module, black)
        line = ["--model", args.model, *weights, "--device", args.device, "--precision", args.precision,
                "--batch", batch, *(["--workers", args.workers] if args.workers else [])]
        print_header(device, f"{torch.get_num_threads()} threads")
        n, ours, floor = len(paths) * args.repeat, [], []
        for turn in range(args.rounds):
            floor.append(bare(module, preprocessing, batch, device, args))
            arguments = [*line, "--dataset", every, "--out", folder / f"{turn}.npy"]
            cost, decodes = whole(arguments, n, device)
            ours.append(cost)
            floor.append(bare(module, preprocessing, batch, device, args))
        rows = [(f"{args.model}, {args.precision}, batch {batch}, of {n:,} pictures one", {
            "ours": typical(ours), "floor": typical(floor), "decodes": f"{decodes:.2f}"})]
        for times in (1, 4):
            part = repeat(paths[:100], times, folder / f"part{times}")
            cost, _ = script("embed.py", *line, "--dataset", part, "--out", folder / f"peak{times}.npy")
            rows.append((f"the command, {times * len(paths[:100]):,} pictures", {"ours": cost}))
    print_table(rows)


if __name__ == "__main__":
    command.run(main, stopped="stopped")
