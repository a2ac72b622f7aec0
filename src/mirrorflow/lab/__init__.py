"""The laboratory: experiments, sweeps over their configurations, and the page of their results."""
