"""The transfer units: LOAD, STORE and what they share."""
