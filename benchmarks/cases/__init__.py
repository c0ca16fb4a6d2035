"""What the benchmarks measure: inputs, competing forms, baseline and targets of every case."""
