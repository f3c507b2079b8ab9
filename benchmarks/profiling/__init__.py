"""Views of `benchmarks.profile` other than the timeline: counters, instructions, rooflines."""
