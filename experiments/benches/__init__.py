"""One benchmark a file: `run(harness) -> {row: {figure: value}}`."""
