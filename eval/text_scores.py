"""Score text runs by benchmarks: GSM8K, MMLU, DROP, BBH, HumanEval, MT-Bench, and recorded figures.

    python -m eval.text_scores runs/lora runs/bilora base --benchmarks gsm8k,mmlu
    python -m eval.text_scores runs/*-cola-* runs/*-mrpc-* --benchmarks heldout    # Tables 1 and 2
    python -m eval.text_scores runs/*-rte-* base --benchmarks heldout,heldout_loss
    python -m eval.text_scores runs/bilora --benchmarks humaneval --allow_code_execution
    python -m eval.text_scores adapter base --model_name_or_path meta-llama/Llama-3.1-8B \\
        --benchmarks mmlu,drop,bbh --limit 20                                      # a trial
    python -m eval.text_scores runs/lora runs/bilora --benchmarks mtbench \\
        --judge_base_url http://localhost:8000/v1 --judge_model judge --mtbench_questions q.jsonl

A run is a run folder or a folder with a PEFT adapter; `base` is the model without one, and among
recorded figures (heldout) what the runs measured before their first step. Runs of one
method that differ in the seed only are one row. What is finished is kept, so that the same command
goes on where it was interrupted. Writes text_scores.json, text_scores.csv and report.md.

Settings: MMLU with 5 examples, DROP and BBH with 3 and no chain of thought, as INSTRUCTEVAL; GSM8K,
HumanEval and MT-Bench with none, under the template of training. Any other task of
lm-evaluation-harness (such as bbh_cot_fewshot) is taken as it is there, and so are those of
--include_path. The judge's key is read from the environment variable JUDGE_API_KEY only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bilora_diffusion.durable import write_text

from .command import Parser, open_folder, run
from .groups import add_arguments
from .provenance import command_line

if TYPE_CHECKING:  # imported where it is used, so that --help does not wait for torch
    from .text.schema import TextScores


def main(argv: Sequence[str] | None = None) -> int:
    """Score and compare.

    Returns:
        The exit code: 0; 2 after a sentence that says what to mend; 130 when it was interrupted.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    return run(lambda: score(_parser().read(words), command_line("eval.text_scores", words)))


def _parser() -> Parser:
    parser = Parser("eval.text_scores", __doc__)
    add_arguments(parser, "run folders, folders with a PEFT adapter, or base")
    add = parser.add_argument
    add("--benchmarks", required=True, metavar="A,B", help="see below")
    add("--control", metavar="ROW", help="compare with this row; default: LoRA, or the first")
    parser.add_output("text_scores")
    add("--model_name_or_path", help="base model; default: what the runs were trained on")
    add("--tokenizer_name", help="default: that of training")
    add("--revision", help="branch, tag or commit of the base model on the hub")
    add("--cache_dir", help="folder of downloads")
    add("--quantize", choices=["none", "nf4"], help="the base model; default: as in training")
    add("--trust_remote_code", action="store_true", help="let the model's own code run")
    add("--num_fewshot", nargs="+", default=[], metavar="N", help="examples, N or NAME=N")
    add("--template", help="run, none, auto, chat, alpaca or plain; default: see below")
    add("--include_path", type=Path, nargs="+", default=[], help="folders with harness tasks")
    add("--limit", type=int, help="the first so many items of each task, for a trial")
    add("--eval_batch_size", type=int, default=8)
    add("--max_new_tokens", type=int, help="of HumanEval (512) and MT-Bench (1024)")
    add("--seed", type=int, default=0, help="of drawn answers")
    add("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the device's best")
    code = parser.add_argument_group("HumanEval")
    code.add_argument(
        "--allow_code_execution", action="store_true", help="run what the model writes, sandboxed"
    )
    code.add_argument("--num_samples", type=int, default=1, help="per problem, for pass@k")
    code.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    code.add_argument("--top_p", type=float, default=0.95, help="where there is a temperature")
    code.add_argument("--execution_timeout", type=float, default=10.0, help="seconds per program")
    talk = parser.add_argument_group("MT-Bench")
    talk.add_argument("--mtbench_questions", metavar="JSONL", help="default: the hub's set")
    talk.add_argument(
        "--judge_base_url", help="OpenAI-compatible, such as http://localhost:8000/v1"
    )
    talk.add_argument("--judge_model", help="its name at the endpoint")
    return parser


def score(args: argparse.Namespace, command: str) -> None:
    """Plan, measure, compare and write.

    Args:
        args: see ``--help``.
        command: for the provenance.

    Raises:
        UserError: bad input, or a judge that can't be reached; what was measured is kept.
        KeyboardInterrupt: Ctrl-C; what was measured is kept.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from bilora_diffusion.image.pipeline import quiet

    from .text import measure, plan

    quiet()
    planned = plan.make(args)
    open_folder(args.output_dir)
    write(measure.run(planned, args.output_dir, command), args.output_dir)


def write(result: TextScores, folder: Path) -> None:
    """Write all files, ``text_scores.json`` last, and print the table and where they are."""
    from .text import report

    write_text(folder / "text_scores.csv", report.to_csv(result))
    write_text(folder / "report.md", report.to_markdown(result))
    result.write(folder)
    said = [*result.notes, report.table(result), report.legend(), "", *report.sentences(result)]
    print("\n".join(["", *said]))
    print(f"\nwritten: {folder}/report.md, text_scores.json, text_scores.csv")


if __name__ == "__main__":
    sys.exit(main())
