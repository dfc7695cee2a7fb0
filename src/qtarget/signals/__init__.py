"""Columns that a target trains on, measured beforehand from the run's own model and rows."""
