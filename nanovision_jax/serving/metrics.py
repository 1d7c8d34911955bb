"""/metrics, in Prometheus' text format, by prometheus_client."""

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

FINISHES = ('stop', 'length', 'cancelled', 'deadline', 'error')


class Metrics:
    """Tells what the schedulers count, at the moment it is asked."""

    def __init__(self, served):
        self.served, self.registry = served, prometheus_client.CollectorRegistry()
        self.registry.register(self)

    def collect(self):
        """As prometheus_client has it."""
        gauges = {
            'waiting': ('Requests that wait for a slot', lambda s: len(s.waiting)),
            'running': ('Requests that have a slot', lambda s: s.busy()),
            'slots': ('Slots', lambda s: s.count),
            'cache_used_ratio': ('Share of the cache that holds tokens', lambda s: s.cache_used()),
            'images_kept': ('Images whose features are kept', lambda s: len(s.store)),
        }
        for name, (text, value) in gauges.items():
            yield self._family(GaugeMetricFamily, name, text, value)
        counters = {
            'prompt_tokens': ('Tokens of prompts', 'prompt tokens'),
            'prompt_tokens_shared': ('Tokens of prompts that were read before', 'prompt tokens shared'),
            'generated_tokens': ('Tokens of answers', 'tokens'),
            'images_seen': ('Images that went through the tower', 'images'),
            'wait_seconds': ('Seconds from a request to its first token, added up', 'wait seconds'),
            'request_seconds': ('Seconds from a request to its end, added up', 'request seconds'),
        }
        for name, (text, key) in counters.items():
            yield self._family(CounterMetricFamily, name, text, lambda s, key=key: s.counts[key])
        family = CounterMetricFamily('nanovision_requests', 'Requests that ended', labels=['model', 'finish'])
        for one in self.served:
            for finish in FINISHES:
                family.add_metric([one.name, finish], one.scheduler.counts[f'finished {finish}'])
        yield family

    def _family(self, kind, name, text, value):
        family = kind(f'nanovision_{name}', text, labels=['model'])
        for one in self.served:
            family.add_metric([one.name], value(one.scheduler))
        return family

    def text(self) -> str:
        """The page."""
        return prometheus_client.generate_latest(self.registry).decode()
