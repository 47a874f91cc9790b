"""Time and peak memory of the losses: upsampled whole (direct), in bands (fused), and as shipped.

    python bench/losses.py
    python bench/losses.py --device cuda --shapes 4x19x512x1024 --stride 8

Each row runs in a process of its own, so that one row's peak does not hide another's. On the CPU
the peak is what the operating system saw (resident set, above that before the first step); on CUDA
what the allocator handed out. The unit is one tensor of logits at label size, float32. Times are
the least of the repetitions, forward and backward together; ratios are to the direct form.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from rdd_pipeline import _fused, difficulty, losses

SHAPES = ("8x11x128x192", "4x11x192x256", "4x11x360x360", "4x19x512x1024")
FORMS = ("direct", "fused", "auto")
LOSSES = ("supervised", "tfe", "tse")

Step = Callable[[], torch.Tensor]


def main() -> None:
    """Print the table, or measure one row when called by it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="BxCxHxW")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--stride", type=int, default=8, help="output stride of the logits")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=10, help="steps measured per row")
    parser.add_argument("--selection", action="store_true", help="hard threshold against a sort")
    parser.add_argument("--row", nargs=3, metavar=("SHAPE", "LOSS", "FORM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.row:
        print(json.dumps(measure_row(*args.row, args)))
        return
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    print(
        f"{datetime.date.today()}, torch {torch.__version__}, {args.device} "
        f"({hardware or platform.machine()}), {args.threads} threads, stride {args.stride}"
    )
    if args.selection:
        print_selection(args)
    else:
        print_losses(args)


def print_losses(args: argparse.Namespace) -> None:
    """One line for each shape, loss and form."""
    print(
        f"{'shape':>15} {'loss':>10} {'form':>7} {'ms':>8} {'peak MB':>8} {'units':>6}  of direct"
    )
    for shape in args.shapes:
        for loss in args.losses:
            direct = None
            for form in FORMS:
                row = run_row(shape, loss, form, args)
                direct = direct or row
                print(
                    f"{shape:>15} {loss:>10} {form:>7} {row['ms']:8.1f} {row['peak'] / 1e6:8.1f} "
                    f"{row['peak'] / row['unit']:6.2f}  {row['ms'] / direct['ms']:.2f} time, "
                    f"{row['peak'] / max(1.0, direct['peak']):.2f} memory"
                )


def run_row(shape: str, loss: str, form: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure one row in a fresh process."""
    command = [
        sys.executable, str(Path(__file__).resolve()), "--row", shape, loss, form,
        "--stride", str(args.stride), "--device", args.device,
        "--threads", str(args.threads), "--repeats", str(args.repeats),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_row(shape: str, loss: str, form: str, args: argparse.Namespace) -> dict[str, float]:
    """Time and peak memory of one loss in this process."""
    B, C, H, W = (int(part) for part in shape.split("x"))
    device = torch.device(args.device)
    # The first use of each form loads code and starts threads; that is no part of the peak.
    usual = _fused._DIRECT_ELEMENTS
    for warm_form in FORMS:
        step_of(loss, warm_form, (1, C, 16, 16), 8, device)().backward()
    _fused._DIRECT_ELEMENTS = usual
    step = step_of(loss, form, (B, C, H, W), args.stride, device)
    before = peak_memory(device)
    step().backward()
    peak = peak_memory(device) - before
    times = []
    for _ in range(args.repeats):
        started = time.perf_counter()
        step().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return {"ms": 1e3 * min(times), "peak": peak, "unit": 4 * B * C * H * W}


def step_of(
    loss: str, form: str, shape: tuple[int, int, int, int], stride: int, device: torch.device
) -> Step:
    """The forward pass of a loss on random inputs."""
    B, C, H, W = shape
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, C, -(-H // stride), -(-W // stride), generator=generator)
    logits = (3 * logits).to(device).requires_grad_()
    target = torch.randint(0, C, (B, H, W), generator=generator).to(torch.uint8)
    target = target.masked_fill(torch.rand(B, H, W, generator=generator) < 0.05, 255).to(device)
    teacher = torch.rand(B, H, W, generator=generator).pow(0.2).to(device)
    if form == "direct":
        return direct_step(loss, logits, target, teacher)
    if form == "fused":
        _fused._DIRECT_ELEMENTS = 0
    if loss == "supervised":
        return lambda: losses.supervised_loss(logits, target)
    if loss == "tfe":
        return lambda: losses.tfe_loss(logits, target, teacher)
    return lambda: losses.tse_loss(logits, target, teacher, min_kept=0.0477)


def direct_step(
    loss: str, logits: torch.Tensor, target: torch.Tensor, teacher: torch.Tensor
) -> Step:
    """The equations written down plainly: interpolate, softmax for p, cross-entropy."""
    size = tuple(target.shape[1:])

    def supervised() -> torch.Tensor:
        upsampled = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
        return F.cross_entropy(upsampled, target.long(), ignore_index=255)

    def tfe() -> torch.Tensor:
        upsampled = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
        pixelwise = F.cross_entropy(upsampled, target.long(), ignore_index=255, reduction="none")
        return (teacher * pixelwise).mean()

    def tse() -> torch.Tensor:
        upsampled = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
        valid = target != 255
        index = target.masked_fill(~valid, 0).long()
        with torch.no_grad():
            prob = F.softmax(upsampled, dim=1).gather(1, index.unsqueeze(1)).squeeze(1)
            prob = prob.masked_fill(~valid, 1.0)
        masks = [difficulty.hard_mask(p, valid, min_kept=0.0477) for p in (prob, teacher)]
        masked = index.masked_fill(~(masks[0] ^ masks[1]), 255)
        return F.cross_entropy(upsampled, masked, ignore_index=255)

    return {"supervised": supervised, "tfe": tfe, "tse": tse}[loss]


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def print_selection(args: argparse.Namespace) -> None:
    """The hard threshold by selection and by a full sort."""
    print(f"{'pixels':>15} {'select ms':>10} {'sort ms':>8}")
    for shape in args.shapes:
        B, _, H, W = (int(part) for part in shape.split("x"))
        prob = torch.rand(B, H, W, device=args.device).pow(0.2)
        valid = torch.ones_like(prob, dtype=torch.bool)
        position = round(0.0477 * prob.numel())
        select = least_time(lambda p=prob, v=valid: difficulty.hard_threshold(p, v, 0.1, 0.0477))
        sort = least_time(lambda p=prob, k=position: p.flatten().sort().values[k - 1])
        print(f"{prob.numel():15,} {1e3 * select:10.2f} {1e3 * sort:8.2f}")


def least_time(call: Callable[[], torch.Tensor], repeats: int = 10) -> float:
    """Seconds of the quickest of some calls; reading the number waits for the device."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call().item()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main()
