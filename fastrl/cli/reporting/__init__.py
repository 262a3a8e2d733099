"""`fastrl report`: what stands in a run's folder, as one page of HTML."""
