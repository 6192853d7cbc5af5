"""Attack a model that should have lost some facts: the original, which has lost nothing, beside a patched one.

python examples/audit_a_model.py
python examples/audit_a_model.py --patch results/npo --attacks forms,in_context,quantize,relearn --facts atlas:people05
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lab import ModelHandle
from lab.audit.base import AuditSubject, Controls
from lab.audit.material import gather
from lab.audit.page import page
from lab.audit.report import AuditReport, lift_text
from lab.audit.run import attack_list, audit
from lab.patch_io import load_saved
from lab.records import write_text_atomically


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--patch", type=Path, help="a patch folder; without it the original is audited alone")
    parser.add_argument("--facts", default="atlas:people01")
    parser.add_argument("--attacks", default="forms,quantize")
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--html", type=Path, default=Path("results/audit.html"))
    options = parser.parse_args(arguments)

    names = attack_list(options.attacks)
    material = gather(options.facts, limit=options.limit)
    handle = ModelHandle.load(options.model)
    subject = AuditSubject(
        handle,
        material.facts,
        Controls(never=material.never),
        retained=material.retained,
        format=material.format,
    )
    reports: list[AuditReport] = [audit(subject, names, title="original")]
    if options.patch is not None:
        with load_saved(options.patch).applied(handle):
            reports.append(audit(subject, names, title=options.patch.name))
    for report in reports:
        for result in report.results:
            print(f"{report.name:>12}  {result.name:<14} lift {lift_text(result.lift)}")
        print(f"{report.name:>12}  worst case {report.worst_case:.3f}")
    write_text_atomically(options.html, page(reports))
    print(f"page -> {options.html}")


if __name__ == "__main__":
    main()
