"""`jaxengine generate | chat | run-batch | convert | bench | collect-env`: options and defaults are the library's."""

import importlib.metadata
import inspect
import json
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial, wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from jaxengine.config import EngineConfig
from jaxengine.errors import ConfigError, JaxEngineError
from jaxengine.request import SamplingParams

# Where the weights and the tokenizer come from: LLM's own arguments, which EngineConfig knows nothing of.
SOURCES: dict[str, tuple[Any, str]] = {
    "model": (str, "Hub id, folder or GGUF file; without it, the small model that ships with jaxengine."),
    "tokenizer": (str, "Hub id or folder of another tokenizer than the model's own."),
    "revision": (str, "Branch, tag or commit on the hub."),
    "load_format": (str, "auto, safetensors, gguf, orbax or dummy."),
    "download_dir": (str, "Where downloads from the hub are kept."),
}
# What shows in text: several completions and log-probabilities have no place to be printed; --seed is the engine's.
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "max_tokens", "min_tokens", "bad_words",
    "allowed_token_ids", "skip_special_tokens", "spaces_between_special_tokens", "timeout",
)  # fmt: skip
PACKAGES = (
    "jaxengine", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "numpy", "transformers",
    "tokenizers", "safetensors", "huggingface_hub", "gguf", "orbax-checkpoint",
)  # fmt: skip
Options = dict[str, inspect.Parameter]
Given = dict[str, Any]
FileFormat = Literal["orbax", "safetensors"]
OutputJson = Annotated[Path | None, typer.Option(help="File for the whole result.")]


def option(name: str, kind: Any, default: Any, help: str) -> inspect.Parameter:
    """A command line option whose value is None unless it was given; --help shows the default that then holds."""
    shown = f"{help}  [default: {'none' if default == () else default}]"
    annotation = Annotated[kind | None, typer.Option(help=shown.strip(), show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def comments(cls: type) -> dict[str, str]:
    """What stands behind each field of a dataclass as a comment."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))


def field_options(cls: type, names: tuple[str, ...] = (), **defaults: Any) -> Options:
    """Options for the fields of a dataclass that one word, number or list of them can say; all, or those named.

    Defaults are the class's own but for `defaults`, for a command that has others.
    """
    helps, found = comments(cls), {}
    for field in fields(cls):
        kind = option_type(field.type)
        if kind is not None and (not names or field.name in names):
            default = defaults.get(field.name, field.default)
            found[field.name] = option(field.name, kind, default, helps.get(field.name, ""))
    return found


def option_type(annotation: Any) -> Any:
    """The type of a command line option for an annotation; None if no option can say such a value."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    if get_origin(annotation) not in (Union, UnionType):
        kinds = [annotation]
    for kind in kinds:
        if get_origin(kind) is not None and get_args(kind)[:1] in ((str,), (int,)):
            return list[get_args(kind)[0]]  # type: ignore[misc]
    if str in kinds:
        return str
    return next((kind for kind in (bool, int, float) if kinds == [kind]), float if float in kinds else None)


def takes(**groups: Options) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of each group, and hands it those that were given as one dict a group."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def command(**values: Any) -> None:
            for name, options in groups.items():
                given = {key: values.pop(key) for key in options}
                values[name] = {key: value for key, value in given.items() if value not in (None, [])}
            function(**values)

        own = inspect.signature(function)
        kept = [p.replace(kind=p.KEYWORD_ONLY) for p in own.parameters.values() if p.name not in groups]
        added = [p for options in groups.values() for p in options.values()]
        command.__signature__ = own.replace(parameters=kept + added)  # type: ignore[attr-defined]
        command.__annotations__ = {}
        return command

    return decorate


def source_options() -> Options:
    from jaxengine.llm import LLM

    parameters = inspect.signature(LLM).parameters
    return {name: option(name, kind, parameters[name].default, help) for name, (kind, help) in SOURCES.items()}


CHAT_DEFAULTS = {"max_tokens": None}
ENGINE = source_options() | field_options(EngineConfig)
SAMPLED = field_options(SamplingParams, SAMPLING)
PROCESSES = {
    "distributed": option("distributed", bool, False, "Join others that share a mesh, as jax.distributed finds them."),
    "coordinator_address": option("coordinator_address", str, None, "Where to join them: host:port of the first."),
    "num_processes": option("num_processes", int, None, "How many they are, where jax.distributed cannot know."),
    "process_id": option("process_id", int, None, "The number of this one, likewise."),
}
SAMPLED_IN_CHAT = field_options(SamplingParams, SAMPLING, **CHAT_DEFAULTS)
app = typer.Typer(
    name="jaxengine", help="LLM inference in JAX.", add_completion=False, no_args_is_help=True,
    pretty_exceptions_enable=False, rich_markup_mode=None, context_settings={"max_content_width": 120},
)  # fmt: skip
bench = typer.Typer(help="Measure speed; print a table, write JSON.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@contextmanager
def open_llm(engine: Given, processes: Given) -> Iterator[Any]:
    """An LLM with these options, in the first of several processes; in the others this does its part and exits."""
    from jaxengine.llm import LLM
    from jaxengine.processes import initialize

    claim_memory(engine)
    joins = processes and processes.get("distributed", True)
    rank = initialize(**{name: value for name, value in processes.items() if name != "distributed"}) if joins else 0
    if rank:
        for sent in (signal.SIGINT, signal.SIGTERM):  # to all at once: the first one decides
            signal.signal(sent, signal.SIG_IGN)
    with LLM(**llm_arguments(engine)) as llm:
        if rank:
            llm.follow()
            raise typer.Exit()
        yield llm


def llm_arguments(engine: Given) -> Given:
    cache = engine.get("compilation_cache")
    return engine | {"compilation_cache": cache == "True"} if cache in ("True", "False") else engine


def claim_memory(engine: Given) -> None:
    """Says what share of the memory jax's GPU client, also a child process's, is to take when it starts."""
    share = engine.get("gpu_memory_utilization", EngineConfig.gpu_memory_utilization)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(share))


def sampling_params(llm: Any, given: Given) -> SamplingParams:
    """The model's own sampling defaults, but for what was given."""
    return replace(llm.get_default_sampling_params(), **given)


def print_stream(outputs: Iterator[Any]) -> str:
    """Prints deltas of one request as they come; returns the whole text."""
    text = ""
    try:
        for output in outputs:
            text += output.outputs[0].text
            print(output.outputs[0].text, end="", flush=True)
    finally:
        print(flush=True)
    return text


@app.command()
@takes(engine=ENGINE, sampling=SAMPLED, processes=PROCESSES)
def generate(
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue; '-' reads one from standard input.")],
    engine: Given,
    sampling: Given,
    processes: Given,
) -> None:
    """Continue texts: one is streamed, several run together.

    A model's generation_config may set other sampling defaults than those shown.
    """
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    with open_llm(engine, processes) as llm:
        params = sampling_params(llm, sampling)
        if len(texts) == 1:
            print(texts[0], end="", flush=True)
            print_stream(llm.generate(texts[0], replace(params, output_kind="delta"), stream=True))
            return
        for text, output in zip(texts, llm.generate(texts, params), strict=True):
            print(f"{text}{output.outputs[0].text}\n")


@app.command()
@takes(engine=ENGINE, sampling=SAMPLED_IN_CHAT, processes=PROCESSES)
def chat(
    engine: Given,
    sampling: Given,
    processes: Given,
    message: Annotated[str | None, typer.Option(help="Answer this one message and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
) -> None:
    """Talk with a model. /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C ends an answer.

    A model's generation_config may set other sampling defaults than those shown.
    """
    start = [{"role": "system", "content": system}] if system else []
    with open_llm(engine, processes) as llm:
        params = replace(sampling_params(llm, CHAT_DEFAULTS | sampling), output_kind="delta")
        if message is not None:
            print_stream(llm.chat([*start, {"role": "user", "content": message}], params, stream=True))
            return
        messages = list(start)
        while (line := read_line()) != "/exit":
            if line == "/reset":
                messages = list(start)
            elif line:
                messages.append({"role": "user", "content": line})
                try:
                    answer = print_stream(llm.chat(messages, params, stream=True))
                    messages.append({"role": "assistant", "content": answer})
                except (KeyboardInterrupt, JaxEngineError) as error:
                    print(f"[{error or 'interrupted'}]", file=sys.stderr)
                    messages.pop()


def read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return "/exit"
    except KeyboardInterrupt:
        print()
        return ""


@app.command()
@takes(engine=ENGINE, sampling=SAMPLED, processes=PROCESSES)
def run_batch(
    engine: Given,
    sampling: Given,
    processes: Given,
    input: Annotated[Path, typer.Option("-i", "--input", help="JSONL in OpenAI's batch format; or .csv, .parquet.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSONL; what it holds already is not done again.")],
    column: Annotated[str | None, typer.Option(help="Of a table, the column with the prompts.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Of a table, the column with the custom_ids.")] = None,
    url: Annotated[str | None, typer.Option(help="Of a table, what its prompts are for; else /v1/completions.")] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What a body's model may be; else the --model, or its last part.")
    ] = None,
    retry_errors: Annotated[bool, typer.Option(help="Run the lines again that have an error.")] = False,
    max_in_flight: Annotated[
        int | None,
        typer.Option(help="Requests (of replicas: lines) in an engine at a time; else twice its shards' rows.", min=1),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(help="Engines, each on a GPU (or CPU) of a Ray cluster; else one, without Ray.", min=1)
    ] = None,
) -> None:
    """Answer a file of requests. Stopped in any way, the same command goes on where it was.

    Sampling options hold where a body says nothing (chat: max_tokens is as many as fit). SIGTERM ends the run with
    status 143; what is answered is in the output.
    """
    from jaxengine.evaluate.batch import Stop
    from jaxengine.evaluate.replicas import run_batch_replicas

    if replicas is not None and processes:
        raise ConfigError(f"{replicas=} are engines of one process each, which share no mesh: leave out {processes}")
    stop = Stop()
    with ExitStack() as stack:
        if replicas is None:
            run: Callable[..., Any] = stack.enter_context(open_llm(engine, processes)).run_batch
        else:
            run = partial(run_batch_replicas, replicas=replicas, engine=llm_arguments(engine))
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, lambda *_: stop.set()))
        try:
            summary = run(
                input, output, defaults=sampling, column=column, id_column=id_column, url=url, stop=stop,
                served_model_name=served_model_name, retry_errors=retry_errors, max_in_flight=max_in_flight,
            )  # fmt: skip
        except OSError as error:
            sys.exit(f"jaxengine: {error}")
    counts = f"{summary.completed} answered, {summary.failed} failed, {summary.skipped} were done before"
    print(f"{output}: {counts}{'; stopped before the end' if summary.stopped else ''}", file=sys.stderr)
    if summary.stopped:
        raise typer.Exit(128 + signal.SIGTERM)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Hub id, folder (HuggingFace, Orbax of any trainer) or GGUF file.")],
    destination: Annotated[Path, typer.Argument(help="Folder to make; it must not exist yet.")],
    to: Annotated[
        FileFormat, typer.Option(help="Orbax, canonical; or safetensors, as transformers has them.")
    ] = "orbax",
    config: Annotated[
        Path | None, typer.Option(help="The model's config.json, for an Orbax checkpoint without.")
    ] = None,
) -> None:
    """Write a model in another format, which `--model DESTINATION` then serves."""
    import jax

    from jaxengine.sharding import create_mesh
    from jaxengine.weights import check_destination, load_params, open_checkpoint, save_checkpoint

    check_destination(destination)
    checkpoint = open_checkpoint(source, config=config)
    cpu = create_mesh(devices=jax.local_devices(backend="cpu"))  # a model may be larger than the accelerator's memory
    params = load_params(checkpoint, checkpoint.config.dtype, cpu)
    save_checkpoint(checkpoint, params, destination, to)
    count = sum(array.size for array in params.values())
    print(f"{destination}: {count:,} parameters of {len(params)} tensors in {checkpoint.config.dtype}")


@bench.command()
@takes(engine=ENGINE, processes=PROCESSES)
def latency(
    engine: Given,
    processes: Given,
    batch_size: Annotated[int, typer.Option(help="Requests at a time.", min=1)] = 8,
    input_len: Annotated[int, typer.Option(help="Prompt tokens a request.", min=1)] = 32,
    output_len: Annotated[int, typer.Option(help="Output tokens a request.", min=1)] = 128,
    num_iters: Annotated[int, typer.Option(help="Batches that are measured.", min=1)] = 10,
    num_iters_warmup: Annotated[int, typer.Option(help="Batches before them, to compile.", min=0)] = 2,
    output_json: OutputJson = None,
) -> None:
    """Run one batch after another, watching every token."""
    from jaxengine.benchmark.serving import run_watched

    measure(run_watched, engine, processes, batch_size, input_len, output_len, num_iters, num_iters_warmup, output_json)


@bench.command()
@takes(engine=ENGINE, processes=PROCESSES)
def throughput(
    engine: Given,
    processes: Given,
    num_prompts: Annotated[int, typer.Option(help="Requests, all at once.", min=1)] = 100,
    input_len: Annotated[int, typer.Option(help="Prompt tokens a request.", min=1)] = 512,
    output_len: Annotated[int, typer.Option(help="Output tokens a request.", min=1)] = 128,
    output_json: OutputJson = None,
) -> None:
    """Run many requests at once, after a first run of as many that compiles."""
    from jaxengine.benchmark.serving import run

    measure(run, engine, processes, num_prompts, input_len, output_len, 1, 1, output_json)


def measure(
    how: Callable[..., Any], engine: Given, processes: Given, count: int, input_len: int, output_len: int, iters: int,
    warmup: int, output_json: Path | None,
) -> None:  # fmt: skip
    """Runs `warmup + iters` batches, their prompts all different: nothing comes from the prefix cache."""
    from jaxengine.benchmark.serving import fixed_length, random_prompts, summarize, table
    from jaxengine.progress import counting_bar

    runs = []
    with open_llm(engine, processes) as llm, counting_bar("Batches") as progress:
        for seed in range(warmup + iters):
            prompts = random_prompts(count, input_len, llm.vocab_size, seed)
            runs.append(how(llm, prompts, [fixed_length(output_len)] * count))
            progress(len(runs), warmup + iters)
    result = summarize(runs[warmup:])
    show(table(result), result, output_json)


@bench.command()
def kernels(output_json: OutputJson = None) -> None:
    """Time the attention kernels on a GPU, beside what the card reads and multiplies. Fails when a run is void."""
    from jaxengine.benchmark.kernels import run, table
    from jaxengine.progress import counting_bar

    with counting_bar("Measuring") as progress:
        result = run(progress)
    show(table(result), result, output_json)
    if result["void"]:
        raise typer.Exit(1)


@bench.command()
@takes(engine={name: option for name, option in ENGINE.items() if name != "compilation_cache"})
def startup(
    engine: Given,
    input_len: Annotated[int, typer.Option(help="Prompt tokens.", min=1)] = 8,
    runs: Annotated[int, typer.Option(help="Starts with a full compilation cache; medians are shown.", min=1)] = 5,
    output_json: OutputJson = None,
) -> None:
    """Time fresh processes up to their first token, the first with an empty compilation cache."""
    from jaxengine.benchmark.startup import run, table
    from jaxengine.progress import counting_bar

    claim_memory(engine)
    with counting_bar("Starting") as progress:
        result = run(engine, input_len, runs, progress)
    show(table(result), result, output_json)


@bench.command()
def load(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a safetensors checkpoint.")],
    output_json: OutputJson = None,
) -> None:
    """Time loading weights onto the device, beside the disk and the way to the device."""
    from jaxengine.benchmark.load import run, table
    from jaxengine.progress import counting_bar

    claim_memory({})
    with counting_bar("Measuring") as progress:
        result = run(model, progress)
    show(table(result), result, output_json)


def show(table: str, result: Given, output_json: Path | None) -> None:
    """Prints the table; the whole result goes to the file, if there is to be one."""
    print(table)
    if output_json is not None:
        output_json.write_text(json.dumps(result, indent=1))


@app.command()
def collect_env() -> None:
    """What a bug report should say: versions, devices, settings."""
    import jax

    print(f"python             {platform.python_version()} on {platform.platform()}")
    print(f"processor          {os.cpu_count()} cores, {platform.machine()}")
    for name in PACKAGES:
        try:
            print(f"{name:<18} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name:<18} -")
    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        print(f"device             {device} {device.device_kind}" + (f", {memory / 2**30:.1f} GiB" if memory else ""))
    for name in sorted(os.environ):
        if name.startswith(("JAX_", "XLA_", "CUDA_VISIBLE", "LIBTPU_")):
            print(f"{name}={os.environ[name]}")


def main() -> None:
    try:
        app()
    except JaxEngineError as error:
        sys.exit(f"jaxengine: {error}")


if __name__ == "__main__":
    main()
