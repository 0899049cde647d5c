// Draws panels of a dashboard with Grafana's own components. drawing.js, which __init__.py writes, has
// the panels with Prometheus' answers to their queries, annotations, range and width.

import { createRoot } from 'react-dom/client';
import { lastValueFrom } from 'rxjs';
import {
  FieldColorModeId, FieldConfigOptionsRegistry, FieldType, ThemeContext, VizOrientation,
  applyFieldOverrides, createTheme, dateTime, getFieldDisplayValues, identityOverrideProcessor,
  locationUtil, renderLegendFormat, standardTransformers,
  standardTransformersRegistry, toDataFrame, transformDataFrame,
} from '@grafana/data';
import {
  BigValue, GlobalStyles, PanelChrome, Table, TimeSeries, UPLOT_AXIS_FONT_SIZE, VizRepeater,
} from '@grafana/ui';
import 'uplot/dist/uPlot.min.css';

const { title, selected, panels, range, annotations, width } = window.drawing;
const ROW_HEIGHT = 38; // Grafana's: 30 and a gap of 8
const GAP = 8;
const theme = createTheme({ colors: { mode: 'dark' } });
const timeRange = {
  from: dateTime(range.from), to: dateTime(range.to), raw: { from: 'now-6h', to: 'now' },
};

// What Grafana's server adds to its components: the registries, the panels' default options, and
// the variables of links.
standardTransformersRegistry.setInit(() => [
  standardTransformers.mergeTransformer, standardTransformers.organizeFieldsTransformer,
  standardTransformers.orderFieldsTransformer, standardTransformers.renameFieldsTransformer,
  standardTransformers.filterFieldsByNameTransformer, standardTransformers.filterFieldsTransformer,
].map((transformation) => ({ id: transformation.id, transformation })));
locationUtil.initialize({
  config: { appSubUrl: '' }, getVariablesUrlParams: () => ({}), getTimeRangeForUrl: () => range,
});

const STANDARD = [
  'unit', 'decimals', 'min', 'max', 'displayName', 'noValue', 'color', 'mappings', 'thresholds',
  'links',
];
const GRAPH = {
  drawStyle: 'line', lineInterpolation: 'linear', lineWidth: 1, fillOpacity: 0,
  gradientMode: 'none', showPoints: 'auto', pointSize: 5, spanNulls: false, insertNulls: false,
  stacking: { mode: 'none', group: 'A' }, axisPlacement: 'auto', axisLabel: '',
  axisColorMode: 'text', axisCenteredZero: false, scaleDistribution: { type: 'linear' },
  barAlignment: 0, barWidthFactor: 0.6, hideFrom: { legend: false, tooltip: false, viz: false },
  thresholdsStyle: { mode: 'off' }, lineStyle: { fill: 'solid' }, axisSoftMin: undefined,
  axisSoftMax: undefined,
};
const CELL = {
  align: 'auto', width: undefined, cellOptions: { type: 'auto' }, inspect: false, filterable: false,
};
const GRAFANAS_STEPS = [{ value: null, color: 'green' }, { value: 80, color: 'red' }];
const CUSTOM = { timeseries: GRAPH, table: CELL, stat: {} };
const COLOUR = {
  timeseries: FieldColorModeId.PaletteClassic, table: FieldColorModeId.Thresholds,
  stat: FieldColorModeId.Thresholds,
};

function registry(custom) {
  const property = (id, isCustom) => ({
    id: isCustom ? `custom.${id}` : id, path: id, isCustom, name: id, shouldApply: () => true,
    process: identityOverrideProcessor,
  });
  return new FieldConfigOptionsRegistry(() => [
    ...STANDARD.map((id) => property(id, false)),
    ...Object.keys(custom).map((id) => property(id, true)),
  ]);
}

function configuration(panel) {
  const { defaults = {}, overrides = [] } = panel.fieldConfig ?? {};
  const steps = defaults.thresholds?.steps ?? GRAFANAS_STEPS;
  return {
    overrides,
    defaults: {
      color: { mode: COLOUR[panel.type] },
      ...defaults,
      custom: { ...CUSTOM[panel.type], ...defaults.custom },
      thresholds: {
        mode: 'absolute', steps: steps.map((step) => ({ ...step, value: step.value ?? -Infinity })),
      },
    },
  };
}

/** Replaces the variables of a link; the others are already replaced. */
function replaceVariables(text, scoped) {
  return text.replace(/\$\{__data\.fields\.(\w+)\}/g, (_match, name) => {
    const { frame, rowIndex } = scoped.__dataContext.value;
    return frame.fields.find((field) => field.name === name).values[rowIndex];
  });
}

// The answers of Prometheus as data frames, as Grafana's data source makes them.

function frames(panel) {
  const tables = panel.targets.filter((target) => target.format === 'table').length;
  return panel.targets.flatMap((target, index) => {
    const series = panel.answers[index];
    if (target.format === 'table') {
      return series.length ? [tableFrame(target, series, tables)] : [];
    }
    return series.map((each) => seriesFrame(target, each));
  });
}

function tableFrame(target, series, tables) {
  const names = [...new Set(series.flatMap((each) => Object.keys(each.metric)))].sort();
  return toDataFrame({
    refId: target.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: series.map((each) => each.value[0] * 1000) },
      ...names.map((name) => (
        { name, type: FieldType.string, values: series.map((each) => each.metric[name]) }
      )),
      {
        name: tables > 1 ? `Value #${target.refId}` : 'Value', type: FieldType.number,
        values: series.map((each) => Number(each.value[1])),
      },
    ],
  });
}

function seriesFrame(target, { metric, values, value }) {
  const points = values ?? [value];
  const name = target.legendFormat && renderLegendFormat(target.legendFormat, metric);
  return toDataFrame({
    refId: target.refId,
    name,
    fields: [
      { name: 'Time', type: FieldType.time, values: points.map(([time]) => time * 1000) },
      {
        name: 'Value', type: FieldType.number, labels: metric,
        config: name ? { displayNameFromDS: name } : {},
        values: points.map(([, text]) => Number(text)),
      },
    ],
  });
}

// One component for each type of panel.

function Stat({ panel, data, fieldConfig, width, height }) {
  const { reduceOptions, colorMode, graphMode, textMode } = panel.options;
  const getValues = () => getFieldDisplayValues({
    data, fieldConfig, reduceOptions, replaceVariables, theme, timeZone: 'utc',
  });
  const renderValue = ({ value, width, height, count }) => (
    <BigValue
      value={value.display} width={width} height={height} count={count} theme={theme}
      colorMode={colorMode} graphMode={graphMode} textMode={textMode} justifyMode="auto"
    />
  );
  return (
    <VizRepeater
      getValues={getValues} renderValue={renderValue} width={width} height={height} source={data}
      orientation={VizOrientation.Auto} autoGrid
    />
  );
}

function Rows({ panel, data, width, height }) {
  return (
    <Table
      data={data[0]} width={width} height={height} initialSortBy={panel.options.sortBy}
      cellHeight={panel.options.cellHeight} timeRange={timeRange}
    />
  );
}

function Graph({ panel, data, width, height }) {
  const shown = annotations.filter(({ ids }) => ids.includes(panel.id));
  return (
    <TimeSeries
      frames={data} structureRev={1} timeRange={timeRange} timeZone="utc" width={width}
      height={height} legend={panel.options.legend} options={panel.options}
    >
      {(config) => <Annotations config={config} events={shown} />}
    </TimeSeries>
  );
}

/** Draws annotations: Grafana's plugin for them, which shows texts on hovering, is no package. */
function Annotations({ config, events }) {
  config.addHook('draw', (plot) => {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.setLineDash([5, 5]);
    ctx.lineWidth = 2;
    ctx.font = `${UPLOT_AXIS_FONT_SIZE}px ${theme.typography.fontFamily}`;
    ctx.textAlign = 'left';
    for (const [index, { time, colour, text }] of events.entries()) {
      const x = plot.valToPos(time, 'x', true);
      ctx.strokeStyle = ctx.fillStyle = theme.visualization.getColorByName(colour);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.fillText(text, x + 5, bbox.top + UPLOT_AXIS_FONT_SIZE * (1 + (index % 4) * 1.2));
    }
    ctx.restore();
  });
  return null;
}

const COMPONENTS = { stat: Stat, table: Rows, timeseries: Graph };

async function drawn(panel) {
  const style = {
    position: 'absolute', left: (panel.gridPos.x / 24) * width + GAP, top: panel.top + 48,
    width: (panel.gridPos.w / 24) * width - GAP, height: panel.gridPos.h * ROW_HEIGHT - GAP,
  };
  if (panel.type === 'row') {
    return <h2 key={panel.id} style={{ ...style, lineHeight: '30px' }}>⌄ {panel.title}</h2>;
  }
  const fieldConfig = configuration(panel);
  const transformations = panel.transformations ?? [];
  const transformed = await lastValueFrom(transformDataFrame(transformations, frames(panel)));
  const data = applyFieldOverrides({
    data: transformed, fieldConfig, fieldConfigRegistry: registry(CUSTOM[panel.type]),
    replaceVariables, theme, timeZone: 'utc',
  });
  const isEmpty = data.every((frame) => frame.length === 0);
  const Component = COMPONENTS[panel.type];
  return (
    <section key={panel.id} style={style}>
      <PanelChrome title={panel.title} width={style.width} height={style.height}>
        {(width, height) => (isEmpty
          ? <div className="empty">{fieldConfig.defaults.noValue ?? 'No data'}</div>
          : <Component {...{ panel, data, fieldConfig, width, height }} />)}
      </PanelChrome>
    </section>
  );
}

async function draw() {
  const sections = await Promise.all(panels.map(drawn));
  createRoot(document.getElementById('page')).render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <h1>
        {title}
        {selected.map(({ label, text }) => <span key={label}>{label} <b>{text}</b></span>)}
      </h1>
      {sections}
    </ThemeContext.Provider>,
  );
}

/** Marks titles that are cut off, once everything has been laid out. */
function markTruncated() {
  for (const title of document.querySelectorAll('h2, [role=columnheader]')) {
    const text = document.createTreeWalker(title, NodeFilter.SHOW_TEXT).nextNode();
    const whole = document.createRange();
    whole.selectNode(text);
    if (whole.getBoundingClientRect().right > title.getBoundingClientRect().right) {
      title.dataset.truncated = title.textContent;
    }
  }
}

draw();
setTimeout(markTruncated, 2000);
