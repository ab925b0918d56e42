"""What a user does with a model of tables: sample, fill, find anomalies, evaluate."""
