"""The benchmark: what se_ext's speed is, and how that is known.

`cases` says what is measured (workloads, variants, the check of each before it is timed), `measure` how (interleaved
timing, the allocator, facts of the machine, the results file), `report` what is said of it (tables, targets, pictures,
pages). `experiments` names what there is to run. Measuring imports nothing of `report`, and needs torch alone; whole
networks need timm as well.

    python -m benchmarks                          lists the experiments
    python -m benchmarks run train                measures one
    python -m benchmarks report [--check]         writes the generated pages from the results files
    python -m benchmarks compare OLD.json NEW.json
"""
