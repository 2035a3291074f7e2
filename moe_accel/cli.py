"""The command line: parse, call, render. Imports neither torch nor accelerate before a command needs them."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_accel.choices import Dequantize, Layout, LoraBLayout, LoraOrder, ModelLayout, Suite, Verify
from moe_accel.errors import ConfigError, MoEAccelError
from moe_accel.quick_help import show_help
from moe_accel.streams import printed
from moe_accel.version import VERSION

if TYPE_CHECKING:
    from moe_accel.adapters.run import Request

app = typer.Typer(
    help="Fine-tune Hugging Face mixture-of-experts models with expert parallelism, training script unmodified.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moe-accel {VERSION}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before the command."""


@app.command(
    # what stands before the first positional argument is kept, what stands after it is not even looked at
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="[ACCELERATE LAUNCH ARGUMENTS] SCRIPT [SCRIPT ARGUMENTS]",
)
def launch(context: typer.Context) -> None:
    """Run [bold]accelerate launch[/bold] with the moe_config section of its config file understood.

    Every argument goes to accelerate launch; --config is short for --config_file. It does what accelerate launch itself
    does where moe-accel is installed, and also where TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps moe-accel out of it.

    [bold]Examples[/bold]

    moe-accel launch --config moe.yaml train.py --learning_rate 1e-5

    moe-accel launch --config moe.yaml --num_processes 4 -m my_project.train
    """
    from moe_accel.launch import main as run_launcher

    run_launcher(context.args)


Family = Annotated[Path | None, typer.Option("--family", help="A TOML table of one's own, read before the others.")]
Base = Annotated[Path | None, typer.Option("--base", help="Adapters: directory of the base model's config.json.")]
ModelType = Annotated[str | None, typer.Option("--model-type", help="Adapters: model_type of the base model.")]
Order = Annotated[LoraOrder | None, typer.Option("--lora-order", help="Adapters: where nothing else says it.")]
BLayout = Annotated[LoraBLayout | None, typer.Option("--lora-b-layout", help="Adapters: where nothing else says it.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Directory to read.", show_default=False)],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="Directory to write, new or empty.", show_default=False)
    ],
    to: Annotated[Layout, typer.Option("--to", help="Layout of the experts.", show_default=False)],
    family: Family = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, or refused.")] = False,
    as_json: Json = False,
    verify: Annotated[Verify, typer.Option(help="What to read back and compare with the source.")] = Verify.full,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that lies in DST.")] = False,
    threads: Annotated[int | None, typer.Option(help="Default: one a core, at most 4.", min=1)] = None,
    dequantize: Annotated[
        Dequantize | None, typer.Option(help="Lossy: write fp8 and fp4 weights as bf16, without scales.")
    ] = None,
    base: Base = None,
    model_type: ModelType = None,
    lora_order: Order = None,
    lora_b_layout: BLayout = None,
) -> None:
    """Convert a checkpoint between layouts of its experts, or a LoRA adapter, bit for bit, and prove it.

    Nothing is loaded: bytes go from file to file, so memory stays small whatever the model. A file gets its name when
    it is whole and checked, the index comes last; interrupted or killed, the same command goes on from there.

    [bold]Examples[/bold]

    moe-accel convert Qwen3-30B-A3B Qwen3-30B-A3B-stacked --to stacked

    moe-accel convert my-adapter my-adapter-vllm --to per-expert
    """
    from moe_accel.adapters.source import is_adapter
    from moe_accel.convert.commands import convert as run_convert
    from moe_accel.convert.run import Options
    from moe_accel.convert.shards import parse_size
    from moe_accel.convert.work import default_threads

    size = parse_size(max_shard_size)
    if is_adapter(source):
        from moe_accel.adapters.commands import convert as convert_adapter

        if dequantize is not None:
            raise ConfigError(f"--dequantize is for models; {source} holds an adapter")
        request = _request(to, family, base, model_type, lora_order, lora_b_layout, overwrite, dry_run)
        raise typer.Exit(convert_adapter(source, target, request, as_json))
    _refuse_adapter_options(source, base, model_type, lora_order, lora_b_layout)
    if to is Layout.peft and source.is_dir():
        raise ConfigError(f"--to peft is for adapters; {source} holds none", "--to stacked is what transformers holds")
    lossy = dequantize.value if dequantize else None
    options = Options(to.value, family, size, verify.value, overwrite, threads or default_threads(), lossy)
    raise typer.Exit(run_convert(source, target, options, dry_run, as_json))


@app.command()
def merge(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Directory of a LoRA adapter.", show_default=False)
    ],
    base: Annotated[Path, typer.Option("--base", help="Directory of its base model.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Directory to write, new or empty.", show_default=False)],
    to: Annotated[ModelLayout | None, typer.Option(help="Layout of the experts. Default: as the base is.")] = None,
    family: Family = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, or refused.")] = False,
    as_json: Json = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that lies in OUT.")] = False,
    threads: Annotated[int | None, typer.Option(help="Default: one a core, at most 4.", min=1)] = None,
    lora_order: Order = None,
    lora_b_layout: BLayout = None,
) -> None:
    """Add a LoRA adapter to its base model, in fp32, and say how much of it survives rounding.

    Adapter and base may have any layouts: experts are matched by layer, number and role. Memory stays small whatever
    the model. A factor that finds no weight is an error. Interrupted or killed, the same command goes on
    from the files that are whole.

    [bold]Examples[/bold]

    moe-accel merge my-adapter --base Qwen3-30B-A3B --out my-model

    moe-accel merge my-adapter --base Qwen3-30B-A3B --out my-model --to stacked --dry-run
    """
    from moe_accel.adapters.commands import merge as run_merge
    from moe_accel.adapters.dialect import Options as AdapterOptions
    from moe_accel.adapters.merge import Options
    from moe_accel.convert.shards import parse_size
    from moe_accel.convert.work import default_threads

    said = AdapterOptions(lora_order.value if lora_order else None, lora_b_layout.value if lora_b_layout else None)
    size, several = parse_size(max_shard_size), threads or default_threads()
    options = Options(to.value if to else None, family, said, size, overwrite, several)
    raise typer.Exit(run_merge(adapter, base, out, options, dry_run, as_json))


@app.command()
def verify(
    first: Annotated[Path, typer.Argument(metavar="A", help="Directory of safetensors files.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one, in any layout.", show_default=False)],
    family: Family = None,
    as_json: Json = False,
    threads: Annotated[int | None, typer.Option(help="Default: one a core, at most 4.", min=1)] = None,
    base: Base = None,
    model_type: ModelType = None,
    lora_order: Order = None,
    lora_b_layout: BLayout = None,
) -> None:
    """Prove that two checkpoints, or two adapters, hold the same bits, whatever their layouts; exit 1 if not.

    Experts are compared by layer, number and role, everything else by name; the first differences are shown.

    [bold]Examples[/bold]

    moe-accel verify Qwen3-30B-A3B Qwen3-30B-A3B-stacked

    moe-accel verify before after --json
    """
    from moe_accel.adapters.source import is_adapter
    from moe_accel.convert.commands import verify as run_verify

    if is_adapter(first) and is_adapter(second):
        from moe_accel.adapters.commands import verify as verify_adapters

        request = _request(Layout.peft, family, base, model_type, lora_order, lora_b_layout)
        raise typer.Exit(verify_adapters(first, second, request, as_json))
    _refuse_adapter_options(first, base, model_type, lora_order, lora_b_layout)
    raise typer.Exit(run_verify(first, second, family, threads, as_json))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Directory of safetensors files.", show_default=False)],
    family: Family = None,
    as_json: Json = False,
    base: Base = None,
    model_type: ModelType = None,
    lora_order: Order = None,
    lora_b_layout: BLayout = None,
) -> None:
    """Show what lies in a checkpoint or an adapter: experts and how they are stored, dtypes, sizes, files.

    [bold]Examples[/bold]

    moe-accel inspect Qwen3-30B-A3B

    moe-accel inspect my-adapter --json
    """
    from moe_accel.adapters.source import is_adapter
    from moe_accel.convert.commands import show

    if is_adapter(path):
        from moe_accel.adapters.commands import show as show_adapter

        request = _request(Layout.peft, family, base, model_type, lora_order, lora_b_layout)
        raise typer.Exit(show_adapter(path, request, as_json))
    _refuse_adapter_options(path, base, model_type, lora_order, lora_b_layout)
    raise typer.Exit(show(path, family, as_json))


@app.command()
def bench(
    suite: Annotated[Suite, typer.Option(help="One MoE block, a full fine-tuning step, or one with LoRA.")],
    shape: Annotated[str, typer.Option(help="Models, separated by commas; tiny is for a CPU.")] = "qwen3-30b-a3b",
    arms: Annotated[str, typer.Option(help="Of native, compile, liger, moe_accel.")] = "native,moe_accel",
    routing: Annotated[str, typer.Option(help="Of random (the router's own), balanced, zipf, hot.")] = "random",
    layers: Annotated[str, typer.Option(help="Depths; two give ms per layer. Default: 4 (tiny: 2).")] = "",
    tokens: Annotated[str, typer.Option(help="Tokens a step, such as 8192,32768. Default: 16384 (tiny: 256).")] = "",
    batch: Annotated[int | None, typer.Option(help="Sequences a step, instead of --tokens.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a sequence. Default: 4096 (tiny: 64).")] = None,
    steps: Annotated[int, typer.Option(help="Timed steps, at least 10.")] = 10,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 4,
    rank: Annotated[int, typer.Option(help="Of the adapters, in the suite lora.")] = 16,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute layers in backward.")] = False,
    kernels: Annotated[str, typer.Option(help="The key of moe_config, for the arm moe_accel.")] = "auto",
    peer_module: Annotated[
        str | None, typer.Option(metavar="FILE_OR_MODULE", help="One more arm: its build(model, shape).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bf16 on a GPU, fp32 on a CPU), bf16 or fp32.")] = "auto",
    timeout: Annotated[float, typer.Option(help="Most seconds of one arm.")] = 600,
    as_json: Json = False,
    out: Annotated[Path | None, typer.Option(help="Also write the report there, as JSON.")] = None,
) -> None:
    """Measure a step beside stock transformers and others; loss and gradients are compared before a time is printed.

    Every arm runs in a process of its own. Shapes: qwen3-30b-a3b, mixtral-8x7b, gpt-oss-20b, nemotron-3-nano,
    deepseek-v3 (64 of its 256 experts), tiny. Exit 1 where an arm disagrees or fails.

    [bold]Examples[/bold]

    moe-accel bench --suite full --layers 4,8 --arms native,compile,moe_accel --out full.json

    moe-accel bench --suite kernel --shape tiny --routing balanced,zipf,hot
    """
    from moe_accel.bench.command import bench as run_bench
    from moe_accel.bench.options import Options, names, numbers

    options = Options(
        suite=suite.value,
        shapes=names(shape),
        routings=names(routing),
        arms=names(arms),
        layers=numbers("layers", layers),
        tokens=numbers("tokens", tokens),
        batch=batch,
        seq_len=seq_len,
        steps=steps,
        warmup=warmup,
        rank=rank,
        checkpointing=checkpointing,
        kernels=kernels,
        peer_module=peer_module,
        device=device,
        dtype=dtype,
        timeout_s=timeout,
    )
    raise typer.Exit(run_bench(options, as_json, out))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what is installed, what of it can be used, why not, and the command that mends it; exit 1 at a fault.

    Python, torch, GPUs and what connects them, the packages beneath and beside moe-accel, its hook into accelerate
    launch, and the moe_config section of accelerate's default config file.

    [bold]Example[/bold]

    moe-accel doctor --json
    """
    from moe_accel.doctor import doctor as run_doctor

    raise typer.Exit(run_doctor(as_json))


def _refuse_adapter_options(folder: Path, *given: object) -> None:
    names = ("--base", "--model-type", "--lora-order", "--lora-b-layout")
    asked = [name for name, value in zip(names, given, strict=True) if value is not None]
    if asked:
        raise ConfigError(f"{' and '.join(asked)} is for adapters; {folder} holds none")


def _request(
    to: Layout,
    family: Path | None,
    base: Path | None,
    model_type: str | None,
    order: LoraOrder | None,
    b_layout: LoraBLayout | None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> "Request":
    from moe_accel.adapters.dialect import Options
    from moe_accel.adapters.run import Request

    said = Options(order.value if order else None, b_layout.value if b_layout else None)
    return Request(to.value, base, model_type, said, family, overwrite, dry_run)


def main() -> None:
    """Entry point of `moe-accel`: exit 2 with `error:` and `hint:` on stderr for what the user can mend."""
    try:
        with printed():
            if not show_help(app, sys.argv[1:]):
                app()
    except MoEAccelError as error:
        from moe_accel.launch import exit_with

        exit_with(error)
