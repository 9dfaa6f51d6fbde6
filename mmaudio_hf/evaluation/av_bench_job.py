"""The process that runs av-benchmark with its own interpreter: `python av_bench_job.py JOB.json RESULT.json`.

It imports nothing of this package, which need not be installed there, and reports in RESULT.json alone: the libraries
behind av-benchmark print to stdout and stderr as they like. It must run on the Python of any such environment.
"""

import json
import os
import sys
import threading
import time
from typing import Any


def run(job: dict[str, Any]) -> dict[str, str]:
    """Extract the features of a job, or only import what it needs; returns the versions. Failures are exceptions."""
    import av_bench.extract
    import av_bench.extraction_models

    versions: dict[str, str] = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers"):
        versions[name] = getattr(sys.modules.get(name), "__version__", "not imported")
    if job["action"] == "check":
        return versions
    import pathlib

    models = av_bench.extraction_models
    models._clap_ckpt_path = pathlib.Path(job["clap"])
    models._syncformer_ckpt_path = pathlib.Path(job["synchformer"])
    av_bench.extract.extract(
        pathlib.Path(job["audio_path"]),
        pathlib.Path(job["output_path"]),
        audio_length=job["audio_length"],
        batch_size=job["batch_size"],
        num_workers=job["num_workers"],
        device=job["device"],
        skip_video_related=job["skip_video_related"],
        skip_clap=job["skip_clap"],
    )
    return versions


def end_with(parent: int) -> None:
    """End this process when the one that started it has ended in any way."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main(job_file: str, result_file: str) -> None:
    with open(job_file) as file:
        job = json.load(file)
    threading.Thread(target=end_with, args=(job["parent"],), daemon=True).start()
    try:
        result: dict[str, Any] = {"ok": run(job)}
    except BaseException as error:
        import traceback

        traceback.print_exc()
        result = {"error": type(error).__name__ + ": " + (str(error).strip().splitlines() or [""])[0]}
    with open(result_file + ".partial", "w") as file:
        json.dump(result, file)
    os.replace(result_file + ".partial", result_file)


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file, whose av_bench.py is another one
    main(*sys.argv[1:])
