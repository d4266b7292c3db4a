"""The package's faults that `diff` has to find in `tiny-sensitive` in fp32, with the head it compares by default."""

from modernbert_align.engines.faults import catalogue

FAULTS = {
    name: fault
    for name, fault in catalogue().items()
    if fault.heads[0] == "masked_lm" and "fp32" in fault.dtypes and fault.phase == "forward" and not fault.equivalent
}
