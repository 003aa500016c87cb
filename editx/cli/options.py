"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CheckpointOption = Annotated[
    str, typer.Option("--checkpoint", envvar="EDITX_CHECKPOINT", help="A name (nano) or a directory.")
]
DeviceOption = Annotated[str, typer.Option("--device", envvar="EDITX_DEVICE", help="cpu, cuda or cuda:N.")]
SeedOption = Annotated[
    int | None, typer.Option("--seed", min=0, max=2**31 - 1, help="The same seed gives the same result.")
]
NBestOption = Annotated[
    int, typer.Option("--n-best", min=1, max=32, help="Draw this many candidates; the reward model picks one.")
]
StepsOption = Annotated[int, typer.Option("--steps", min=1, max=100, help="Steps of the flow; fewer are faster.")]
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", min=0.0, max=2.0, help="How boldly tokens are drawn; else as the checkpoint says."),
]
JudgeOption = Annotated[
    str, typer.Option("--judge", help="A judge file of `eval fit-judge`, gemini:MODEL or openai:MODEL.")
]
JudgeUrlOption = Annotated[
    str, typer.Option("--judge-url", envvar="EDITX_JUDGE_URL", help="Address of the judge's API.")
]
JudgeKeyOption = Annotated[str, typer.Option("--judge-key", envvar="EDITX_JUDGE_KEY", help="Key of the judge's API.")]
JudgeRateOption = Annotated[
    float,
    typer.Option("--judge-rate", envvar="EDITX_JUDGE_RATE", help="Calls to the judge's API in a minute, at most."),
]
JudgeCostOption = Annotated[
    float, typer.Option("--judge-cost", envvar="EDITX_JUDGE_COST", help="What a call costs, in any currency.")
]
JudgeBudgetOption = Annotated[
    float | None,
    typer.Option(
        "--judge-budget",
        envvar="EDITX_JUDGE_BUDGET",
        help="What all calls may cost; then the run stops, to go on later.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document per run on standard output.")]
PictureOption = Annotated[
    Path | None, typer.Option("--picture", help="Draw source and result with F0 and energy into this PNG.")
]
AsrOption = Annotated[bool, typer.Option("--asr", help="Write the text down by speech recognition if it is not given.")]
OutOption = Annotated[
    str | None,
    typer.Option(
        "--out",
        "-o",
        help="WAV, FLAC, MP3 or Opus by its suffix, IN.edited.wav by default; a folder for a batch; - for stdout.",
    ),
]
CloneOutOption = Annotated[
    str | None,
    typer.Option("--out", "-o", help="WAV, FLAC, MP3 or Opus by its suffix, REF.cloned.wav by default; - for stdout."),
]
