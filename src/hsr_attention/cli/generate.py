"""``hsr generate``: continue a long document, and show what it took."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsr_attention.cli import console, options
from hsr_attention.evaluation.errors import InputError

if TYPE_CHECKING:
    from hsr_attention.evaluation.comparison import Run
    from hsr_attention.evaluation.decode_statistics import Summary
    from hsr_attention.evaluation.generation import Agreement
    from hsr_attention.evaluation.models import Model


def run(
    model: options.Model,
    prompt_file: options.PromptFile = None,
    essays: options.Essays = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate.")
    ] = 64,
    policy: options.PolicyWords = None,
    dtype: options.DtypeOption = options.Dtype.float32,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-prompt-tokens", min=1, help="Keep the first tokens.", show_default=False
        ),
    ] = None,
    max_context: options.MaxContext = None,
    rope_scaling: Annotated[
        options.RopeScaling | None,
        typer.Option(
            "--rope-scaling",
            help="Extend the model's context as far as the prompt needs.",
            show_default=False,
        ),
    ] = None,
    prefill_chunk: Annotated[
        int, typer.Option("--prefill-chunk", min=1, help="Tokens of the prompt at a time.")
    ] = 1024,
    storage: Annotated[
        options.Storage,
        typer.Option(
            "--storage",
            help="Full-precision keys and values in memory, or in files, for long contexts.",
        ),
    ] = options.Storage.memory,
    storage_directory: Annotated[
        Path | None,
        typer.Option(
            "--storage-directory",
            help="Of those files, with --storage disk.",
            show_default="that of temporary files",
        ),
    ] = None,
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="Run the fastest dense path as well.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="Write a picture (PNG).", show_default=False),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")
    ] = False,
    threads: options.Threads = None,
    parallel_linear: options.ParallelLinear = True,
    json: options.Json = False,
) -> None:
    """Continue a document greedily with half-space reporting attention.

    Example: hsr generate --model smollm2 --essays 8000 --compare-dense
    """
    wanted = options.policy(policy) if policy else None
    options.picture(report, "--report")
    loaded, ids = options.load_with_text(
        model,
        dtype,
        prompt_file,
        essays,
        max_prompt_tokens,
        max_new_tokens,
        max_context,
        threads,
        shorten="--max-prompt-tokens",
        extend=rope_scaling is not None,
    )
    tokenizer = loaded.tokenizer
    from hsr_attention.evaluation import comparison, generation
    from hsr_attention.evaluation.decode_statistics import summary

    wanted = options.fitting(wanted, loaded)
    settings: dict[str, Any] = {
        "stop": set() if ignore_eos else generation.stop_tokens(loaded.model),
        "positions": comparison.sweep(ids.shape[1]) if report else None,
    }
    dense = None
    with options.linear_layers(loaded.model, parallel_linear) as split:
        with _Screen(tokenizer, ids.shape[1], "prefill", silent=json) as screen:
            hsr = comparison.run_hsr(
                loaded.model,
                ids,
                wanted,
                max_new_tokens,
                chunk=prefill_chunk,
                watch=screen.watch,
                storage=generation.Storage(str(storage), storage_directory),
                **settings,
            )
        if compare_dense:
            with _Screen(tokenizer, ids.shape[1], "dense prefill", silent=True) as screen:
                dense = comparison.run_dense(
                    loaded.model,
                    ids,
                    max_new_tokens,
                    compared_to=hsr.decoded,
                    watch=screen.watch,
                    **settings,
                )
    found = summary(hsr.statistics)
    if report is not None:
        _draw(report, loaded, hsr, dense, found)
    if json:
        result = _as_dict(loaded, wanted, hsr, dense, found)
        picture = None if report is None else str(report)
        console.print_json(result | {"linear_parts": split, "report": picture})
    else:
        _print(loaded, wanted, hsr, dense, found)
        console.out().print(options.linear_line(split))
        if report is not None:
            console.out().print(f"Picture: {report}")


class _Screen:
    """The progress bar of a prefill, and the text as it comes."""

    def __init__(self, tokenizer: Any, prompt: int, what: str, silent: bool) -> None:
        from hsr_attention.evaluation.comparison import Watch
        from hsr_attention.evaluation.generation import Detokenizer

        self._words = Detokenizer(tokenizer)
        self._silent = silent
        self._prompt = prompt
        self._bar = console.progress()
        self._task = self._bar.add_task(what, total=prompt)
        self.watch = Watch(self._prefilled, self._token)

    def __enter__(self) -> _Screen:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        if not self._silent and error[0] is None:
            print(flush=True)

    def _prefilled(self, done: int) -> None:
        self._bar.update(self._task, completed=done)
        if done == self._prompt:
            self._bar.stop()

    def _token(self, token: int) -> None:
        if not self._silent:
            sys.stdout.write(self._words.add(token))
            sys.stdout.flush()


def _draw(path: Path, loaded: Model, hsr: Run, dense: Run | None, found: Summary | None) -> None:
    try:
        from hsr_attention.evaluation import pictures

        dtype = str(loaded.model.dtype).removeprefix("torch.")
        title = (
            f"{loaded.source.name}, {dtype}: {hsr.prompt_tokens:,} tokens of prompt, "
            f"{len(hsr.decoded.tokens)} generated"
        )
        pictures.generation(path, title, hsr, dense, found)
    except OSError as error:
        raise InputError(f"--report: {path} cannot be written: {error.strerror}") from None


def _print(loaded: Model, policy: Any, hsr: Run, dense: Run | None, found: Summary | None) -> None:
    runs = [hsr] if dense is None else [hsr, dense]
    lines: list[tuple[str, list[str]]] = [
        ("attention", [run.path for run in runs]),
        ("prefill: time to first token", [f"{run.prefill_seconds:.2f} s" for run in runs]),
        ("tokens generated", [str(len(run.decoded.tokens)) for run in runs]),
        ("decoding", [_speed(run) for run in runs]),
        ("peak memory (model included)", [console.megabytes(run.peak_bytes) for run in runs]),
        ("keys and values / codes", [_cache(run) for run in runs]),
    ]
    if found is not None:
        blank = [console.NONE] * (len(runs) - 1)
        for what, value in (
            ("omitted mass, bound: median / worst", found.omitted_mass),
            ("error bound, of the largest value: median / worst", found.relative_bound),
            ("error, estimated: median / worst", found.relative_estimate),
        ):
            lines.append((what, [_spread(value), *blank]))
        lines.append(("density, mean", [console.percent(float(found.density.mean())), *blank]))
    columns = ["", "half-space reporting"] + (["dense"] if dense else [])
    title = f"{loaded.source.name}, {hsr.prompt_tokens:,} tokens of prompt"
    if loaded.scaled_from:
        title += f" (context {loaded.scaled_from:,} extended to {loaded.context:,} by YaRN)"
    print()
    rows = [[name, *cells] for name, cells in lines]
    console.print_table(f"{title}\n{policy}", columns, rows)
    if found is not None:
        _print_density(found)
    if dense is not None and dense.agreement is not None:
        _print_agreement(hsr, dense, dense.agreement)


def _speed(run: Run) -> str:
    return console.number(run.decoded.tokens_per_second, 3, " tokens/s")


def _cache(run: Run) -> str:
    if not run.cache_bytes:
        return console.NONE
    return " / ".join(console.megabytes(run.cache_bytes[part]) for part in ("rows", "codes"))


def _spread(value: Any) -> str:
    if value is None:
        return console.NONE
    return f"{console.percent(value.median)} / {console.percent(value.worst)}"


def _print_density(found: Summary) -> None:
    rows = [
        [str(layer), *(console.percent(x) for x in (d.mean(), d.min(), d.max()))]
        for layer, d in zip(found.layers, found.density, strict=True)
    ]
    title = "Density by layer: share of the keys attended to"
    console.print_table(title, ["layer", "mean", "least head", "most head"], rows)


def _print_agreement(hsr: Run, dense: Run, found: Agreement) -> None:
    first = found.first_difference
    speeds = hsr.decoded.tokens_per_second, dense.decoded.tokens_per_second
    rows = [
        ["same token, both running free", f"{found.tokens} of {found.of}"],
        ["first difference at token", "none" if first is None else str(first + 1)],
        ["same most probable token, same text forced", f"{found.best} of {found.best_of}"],
        ["next-token log-probability, |difference|: mean", f"{found.logprob_mean:.4f} nats"],
        ["next-token log-probability, |difference|: max", f"{found.logprob_max:.4f} nats"],
    ]
    rows.append(
        [
            "prefill speed, whole model",
            f"{dense.prefill_seconds / hsr.prefill_seconds:.2f} x dense",
        ]
    )
    if speeds[0] and speeds[1]:
        rows.append(["decoding speed, whole model", f"{speeds[0] / speeds[1]:.2f} x dense"])
    console.print_table("Compared with dense", ["", "found"], rows)


def _as_dict(
    loaded: Model, policy: Any, hsr: Run, dense: Run | None, found: Summary | None
) -> dict[str, Any]:
    return {
        "model": loaded.source.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "context": loaded.context,
        "context_before_yarn": loaded.scaled_from,
        "policy": repr(policy),
        "prompt_tokens": hsr.prompt_tokens,
        "hsr": _run_dict(loaded, hsr) | {"certificate": None if found is None else asdict(found)},
        "dense": None if dense is None else _run_dict(loaded, dense),
        "agreement": asdict(dense.agreement) if dense and dense.agreement else None,
        "machine": options.machine(),
    }


def _run_dict(loaded: Model, run: Run) -> dict[str, Any]:
    decoded = run.decoded
    return {
        "path": run.path,
        "text": loaded.tokenizer.decode(decoded.tokens, skip_special_tokens=True),
        "tokens": decoded.tokens,
        "logprobs": decoded.logprobs,
        "prefill_seconds": run.prefill_seconds,
        "decode_tokens_per_second": decoded.tokens_per_second,
        "decode_seconds": decoded.seconds,
        "seconds_by_position": run.by_position,
        "peak_bytes": run.peak_bytes,
        "cache_bytes": run.cache_bytes or None,
    }
