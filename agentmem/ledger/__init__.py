"""What every use cost and saved: uses, prices, budgets, sums and the report."""
