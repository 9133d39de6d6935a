"""The kinds of panels that the dashboards are made of, each with what all of its kind share."""

from __future__ import annotations

from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as shared
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heatmap_model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana.queries import buckets
from kvpilot import metrics
from kvpilot.metrics import Metric

Panel = Builder[model.Panel]

SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "kvpilot"
WIDTH = 24
"""Columns of Grafana's grid."""
GREEN, YELLOW, RED = "green", "yellow", "red"

# Grafana's names of units.
SECONDS, BYTES, PER_SECOND, BYTES_PER_SECOND, SHARE, COUNT = "s", "bytes", "cps", "Bps", "percentunit", "short"
NATS = "suffix: nats"


@dataclass(frozen=True)
class Query:
    """An expression and what the legend calls its series."""

    expression: str
    legend: str = ""

    def target(self, number: int, instant: bool = False) -> prometheus.Dataquery:
        """It as a panel's target; an instant one gives a value of now instead of a line."""
        query = prometheus.Dataquery().datasource(SOURCE).ref_id("ABCDEFGHIJ"[number]).expr(self.expression)
        query = query.legend_format(self.legend or "__auto")
        return query.instant() if instant else query.range()


def steps(*limits: tuple[float, str]) -> dashboard.ThresholdsConfig:
    """Green, and from each limit on another colour."""
    levels = [model.Threshold(value=None, color=GREEN), *(model.Threshold(value, color) for value, color in limits)]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(levels)


def lines(
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    width: int = 8,
    stacked: bool = False,
    most: float | None = None,
    limits: tuple[tuple[float, str], ...] = (),
    logarithmic: bool = False,
) -> Panel:
    """Lines over time; ``limits`` are drawn as dashed ones."""
    panel = timeseries.Panel().title(title).description(description).datasource(SOURCE).unit(unit)
    panel = panel.span(width).height(8).line_width(1).fill_opacity(40 if stacked else 8)
    panel = panel.show_points(shared.VisibilityMode.NEVER).thresholds(steps(*limits))
    if logarithmic:
        panel = panel.scale_distribution(common.ScaleDistributionConfig().type(shared.ScaleDistribution.LOG).log(10))
    else:
        panel = panel.min(0)
    if most is not None:
        panel = panel.max(most)
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(shared.StackingMode.NORMAL))
    if limits:
        panel = panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(shared.GraphThresholdsStyleMode.DASHED))
    panel = panel.legend(
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(shared.LegendDisplayMode.LIST)
        .placement(shared.LegendPlacement.BOTTOM)
    )
    panel = panel.tooltip(
        common.VizTooltipOptions().mode(shared.TooltipDisplayMode.MULTI).sort(shared.SortOrder.DESCENDING)
    )
    for number, query in enumerate(queries):
        panel = panel.with_target(query.target(number))
    return panel


def figure(
    title: str,
    description: str,
    query: Query,
    unit: str,
    limits: tuple[tuple[float, str], ...] = (),
    width: int = 3,
    words: bool = False,
) -> Panel:
    """One number, or the legend's words in its place, with its course behind it."""
    panel = stat.Panel().title(title).description(description).datasource(SOURCE).unit(unit).span(width).height(4)
    panel = panel.thresholds(steps(*limits)).no_value("none" if words else "0")
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    panel = panel.color_mode(shared.BigValueColorMode.VALUE)
    panel = panel.graph_mode(shared.BigValueGraphMode.NONE if words else shared.BigValueGraphMode.AREA)
    if words:
        panel = panel.text_mode(shared.BigValueTextMode.NAME)
    return panel.with_target(query.target(0, instant=words))


def heat(title: str, description: str, histogram: Metric, unit: str, width: int = 8, **labels: str) -> Panel:
    """A histogram over time, as Prometheus counts it: no bucket is made up."""
    query = Query(buckets(histogram, **labels), "{{le}}")
    colours = heatmap.HeatmapColorOptions().mode(heatmap_model.HeatmapColorMode.SCHEME).scheme("Turbo")
    panel = heatmap.Panel().title(title).description(description).datasource(SOURCE).span(width).height(8).unit(unit)
    panel = panel.calculate(False).color(colours.exponent(0.5).steps(64).fill("dark-orange"))
    panel = panel.y_axis(heatmap.YAxisConfig().unit(unit).axis_placement(shared.AxisPlacement.LEFT))
    panel = panel.mode(shared.TooltipDisplayMode.SINGLE).show_legend()
    return panel.with_target(query.target(0).format(PromQueryFormat.HEATMAP))


def listing(title: str, description: str, query: Query, columns: tuple[str, ...], width: int = 8) -> Panel:
    """A table of series of now: these labels."""
    panel = (
        table.Panel().title(title).description(description).datasource(SOURCE).span(width).height(8).no_value("none")
    )
    kept = model.DataTransformerConfig(id_val="filterFieldsByName", options={"include": {"names": list(columns)}})
    return panel.with_target(query.target(0, instant=True).format(PromQueryFormat.TABLE)).with_transformation(kept)


def rows(*parts: tuple[str, tuple[Panel, ...]]) -> list[tuple[dashboard.Row, tuple[Panel, ...]]]:
    """Panels below their rows' titles."""
    return [(dashboard.Row(title), panels) for title, panels in parts]


def board(
    uid: str, title: str, description: str, parts: list[tuple[dashboard.Row, tuple[Panel, ...]]]
) -> dashboard.Dashboard:
    """A dashboard with the variables that all have: datasource, namespace, model, worker."""
    made = dashboard.Dashboard(title).uid(uid).description(description).tags([TAG]).time("now-1h", "now").refresh("30s")
    made = made.editable().tooltip(model.DashboardCursorSync.CROSSHAIR)
    made = made.link(
        dashboard.DashboardLink("kvpilot")
        .type(model.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .as_dropdown(True)
        .include_vars(True)
        .keep_time(True)
    )
    made = made.annotation(
        dashboard.AnnotationQuery()
        .name("Another bundle in force")
        .datasource(SOURCE)
        .enable(True)
        .icon_color("purple")
        .expr(f'sum(changes({metrics.BUNDLE_SWAPS.name}{{namespace=~"$namespace"}}[1m])) > 0')
    )
    source = dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    made = made.with_variable(source)
    for variable in (
        _variable("namespace", "Namespace", f"label_values({metrics.BUILD_INFO.name}, namespace)"),
        _variable("model", "Model", f'label_values({metrics.WORKER_INFO.name}{{namespace=~"$namespace"}}, model)'),
        _variable(
            "worker",
            "Worker",
            f'query_result({metrics.WORKER_INFO.name}{{namespace=~"$namespace", model=~"$model"}})',
        ).regex(WORKERS),
    ):
        made = made.with_variable(variable)
    for row, panels in parts:
        made = made.with_row(row)
        for panel in panels:
            made = made.with_panel(panel)
    return made


WORKERS = '/instance="(?<value>[^"]+)".*worker="(?<text>[^"]+)"/'
"""Shows a worker's name and filters by its instance, which all of its series have."""


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """A variable of several values; All also lets series through that lack the label, as there is no namespace without
    Kubernetes."""
    everything = model.VariableOption(selected=True, text=["All"], value=["$__all"])
    variable = dashboard.QueryVariable(name).label(label).datasource(SOURCE).query(query)
    variable = variable.refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED).multi(True).include_all(True)
    return variable.all_value(".*").current(everything).sort(model.VariableSort.NATURAL_ASC)
