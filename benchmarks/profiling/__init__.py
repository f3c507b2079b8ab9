"""What `benchmarks.profile` shows beside a timeline: kernel counters, instructions, rooflines."""
