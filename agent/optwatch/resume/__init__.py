"""Whether a run goes on from exactly what its checkpoint was: fingerprints at save, compared before the first step."""
