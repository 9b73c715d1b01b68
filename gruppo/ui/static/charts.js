// Curves: one plotly figure per group of metrics, with smoothing, logarithmic axes, events, and zoom that stays.
(function () {
  "use strict";
  const gruppo = (window.gruppo = window.gruppo || {});
  // Okabe and Ito's colors, darkened or lightened for contrast on each background.
  const LIGHT = ["#0b5cad", "#c25700", "#00785b", "#a04787", "#8a6d00", "#2f7fb8", "#5b5b5b", "#7a3b00"];
  const DARK = ["#7fb8f0", "#f6a15b", "#52cfa6", "#e29ccb", "#e8cd5a", "#9ad4f5", "#c0c0c0", "#d9a074"];
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "solid", "dash", "dot"];

  function css(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
  function resolved(name) { // light-dark() has to be resolved by the browser
    const probe = document.createElement("span");
    probe.style.color = "var(" + name + ")";
    document.body.append(probe);
    const color = getComputedStyle(probe).color;
    probe.remove();
    return color;
  }
  function faded(color, share) {
    const hex = /^#(..)(..)(..)$/.exec(color);
    return hex ? "rgba(" + [1, 2, 3].map(function (i) { return parseInt(hex[i], 16); }).join(",") + "," + share + ")" : color;
  }

  // Exponential moving average, without the bias towards its first value.
  function smooth(values, weight) {
    if (!weight) return values;
    let mean = 0, total = 0;
    return values.map(function (value) {
      if (value === null) return null;
      mean = weight * mean + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return mean / total;
    });
  }
  gruppo.smooth = smooth;

  const FORMATS = { share: ".1~%", bytes: ".3~s", seconds: ".3~s", "": ".4~g" };
  function words(value, unit) {
    if (value === null || value === undefined) return "not recorded";
    if (unit === "share") return (100 * value).toFixed(1) + "%";
    if (unit === "bytes") return (value / 1e9).toFixed(2) + " GB";
    return Number(value.toPrecision(4)).toString() + (unit === "seconds" ? " s" : "");
  }

  function traces(chart, settings, axis) {
    const colors = gruppo.isDark() ? DARK : LIGHT;
    const found = [];
    chart.curves.forEach(function (curve, number) {
      const color = colors[(curve.color !== undefined ? curve.color : number) % colors.length];
      const dash = DASHES[(curve.dash !== undefined ? curve.dash : chart.kind === "stack" ? 0 : number) % DASHES.length];
      const group = { legendgroup: curve.name + (curve.run || ""), hoverlabel: { namelength: -1 } };
      const value = chart.unit === "share" ? "%{y:.1%}" : chart.unit === "bytes" ? "%{y:.3s}B" : "%{y:.4~g}" + (chart.unit === "seconds" ? " s" : "");
      const band = curve.band ? [curve.band[0].y, curve.band[1].y] : curve.low ? [curve.low, curve.high] : null;
      if (band && chart.kind !== "stack") {
        const x = curve.band ? curve.band[0].x : curve.x;
        const shared = { mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, connectgaps: false };
        found.push(Object.assign({ x: x, y: band[0] }, shared, group));
        found.push(Object.assign({ x: x, y: band[1], fill: "tonexty", fillcolor: faded(color, 0.15) }, shared, group));
      }
      if (settings.smoothing && chart.kind !== "stack") found.push(Object.assign({
        x: curve.x, y: curve.y, mode: "lines", line: { color: faded(color, 0.28), width: 1 }, hoverinfo: "skip", showlegend: false,
      }, group));
      const points = curve.y.filter(function (y) { return y !== null; }).length;
      found.push(Object.assign({
        x: curve.x, y: chart.kind === "stack" ? curve.y : smooth(curve.y, settings.smoothing), name: curve.label,
        mode: points < 40 && chart.kind !== "stack" ? "lines+markers" : "lines", connectgaps: false,
        line: { color: color, width: chart.kind === "stack" ? 1 : 2, dash: dash }, marker: { size: 4, color: color },
        stackgroup: chart.kind === "stack" ? "all" : undefined, fillcolor: chart.kind === "stack" ? faded(color, 0.55) : undefined,
        hovertemplate: value + "<extra>" + escaped(curve.label) + "</extra>",
      }, group));
    });
    if (settings.marks && settings.events.length) {
      const grouped = new Map();
      settings.events.forEach(function (event) {
        const texts = grouped.get(event.x) || [];
        if (texts.length < 4) texts.push("<b>" + escaped((event.warning || event.kind).replace(/_/g, " ")) + (event.passed ? " (passed)" : "") + "</b> " + wrapped(event.message));
        grouped.set(event.x, texts);
      });
      const xs = Array.from(grouped.keys());
      found.push({
        x: xs, y: xs.map(function () { return 0; }), yaxis: "y2", mode: "markers", name: "events", showlegend: false,
        marker: { symbol: "triangle-up", size: 9, color: resolved("--warn") },
        text: xs.map(function (x) { return grouped.get(x).join("<br>"); }), hovertemplate: "%{text}<extra></extra>",
      });
    }
    return found;
  }
  // plotly reads a few tags in texts; a name from a run is only text.
  function escaped(text) { return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); }
  function wrapped(text) {
    const short = text.length > 240 ? text.slice(0, 240) + "…" : text;
    return escaped(short.replace(/(.{60}\S*)\s/g, "$1\n")).replace(/\n/g, "<br>");
  }

  function layout(chart, settings, axis, axes) {
    const text = resolved("--muted"), line = resolved("--line");
    const curves = chart.curves.length;
    return {
      margin: { l: 52, r: 12, t: 8, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: css("--sans"), size: 12, color: text }, hovermode: "x unified", uirevision: "keep " + axis,
      hoverlabel: { bgcolor: resolved("--surface"), bordercolor: line, font: { color: resolved("--text"), size: 12 }, align: "left" },
      showlegend: curves > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
      xaxis: { title: { text: axes[axis], font: { size: 11 } }, gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, hoverformat: ".4~g" },
      yaxis: { type: settings.logarithmic ? "log" : "linear", tickformat: FORMATS[chart.unit], gridcolor: line, zerolinecolor: line, automargin: true, rangemode: chart.kind === "stack" || small(chart) ? "tozero" : "normal",
        autorangeoptions: chart.unit === "share" && !settings.logarithmic ? { clipmin: -0.05, clipmax: 1.05 } : {} },
      yaxis2: { overlaying: "y", range: [-0.02, 1], visible: false, fixedrange: true },
    };
  }

  // Shares that are all close to 0 are drawn from 0 up.
  function small(chart) {
    return chart.unit === "share" && chart.curves.every(function (curve) { return curve.y.every(function (y) { return y === null || y < 0.02; }); });
  }

  function described(chart) {
    return chart.title + ". " + chart.curves.map(function (curve) {
      const known = curve.y.map(function (y, i) { return [curve.x[i], y]; }).filter(function (point) { return point[1] !== null; });
      if (!known.length) return curve.label + ": not recorded";
      const first = known[0], last = known[known.length - 1];
      return curve.label + ": from " + words(first[1], chart.unit) + " to " + words(last[1], chart.unit) + ", " + known.length + " points";
    }).join("; ");
  }

  function mount(section) {
    const grid = section.querySelector(".charts"), script = section.querySelector("script.data");
    const first = gruppo.data(script);
    let payload = first;
    const shown = new Map();
    const settings = { smoothing: 0, logarithmic: false, marks: true, events: payload.events || [] };
    const control = function (name) { return section.querySelector('[data-control="' + name + '"]'); };
    const kept = gruppo.remember("gruppo.smoothing");
    if (kept && control("smoothing")) { control("smoothing").value = kept; settings.smoothing = Number(kept); }

    const visible = new IntersectionObserver(function (entries) {
      entries.forEach(function (entry) {
        const state = shown.get(entry.target.dataset.chart);
        if (!state) return;
        state.near = entry.isIntersecting;
        if (state.near && state.stale) draw(state);
      });
    }, { rootMargin: "300px" });

    function draw(state) {
      state.stale = false;
      const arguments_ = [state.plot, traces(state.chart, settings, payload.axis), layout(state.chart, settings, payload.axis, payload.axes),
        { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], displayModeBar: "hover" }];
      window.Plotly.react.apply(null, arguments_);
      state.figure.querySelector(".latest").textContent = latest(state.chart);
      state.plot.setAttribute("aria-label", described(state.chart));
    }
    function latest(chart) {
      if (chart.curves.length > 1 && chart.kind === "stack") return "";
      const values = chart.curves[0].y.filter(function (y) { return y !== null; });
      return values.length ? words(values[values.length - 1], chart.unit) : "";
    }
    function refresh() {
      shown.forEach(function (state) { state.stale = true; if (state.near) draw(state); });
    }
    function place(chart) {
      let holder = grid;
      if (!chart.open) {
        holder = grid.querySelector(".more-charts .charts");
        if (!holder) {
          const more = document.createElement("details"), title = document.createElement("summary");
          holder = document.createElement("div");
          more.className = "more-charts";
          holder.className = "charts";
          title.textContent = "More metrics";
          more.append(title, holder);
          grid.append(more);
        }
      }
      const figure = document.createElement("figure"), caption = document.createElement("figcaption"), plot = document.createElement("div");
      figure.className = "chart card";
      figure.dataset.chart = chart.id;
      plot.className = "plot";
      plot.setAttribute("role", "group"); // plotly's buttons are in it
      plot.setAttribute("aria-label", described(chart));
      [["title", chart.title], ["num latest", ""], ["muted small", chart.help]].forEach(function (part) {
        const span = document.createElement("span");
        span.className = part[0];
        span.textContent = part[1];
        caption.append(span);
      });
      figure.append(caption, plot);
      const more = grid.querySelector(":scope > .more-charts");
      if (holder === grid && more) grid.insertBefore(figure, more); else holder.append(figure);
      shown.set(chart.id, { chart: chart, figure: figure, plot: plot, near: false, stale: true });
      visible.observe(figure);
    }
    function take(fresh) {
      payload = fresh;
      settings.events = fresh.events || [];
      const ids = new Set(fresh.charts.map(function (chart) { return chart.id; }));
      shown.forEach(function (state, id) { if (!ids.has(id)) { window.Plotly.purge(state.plot); state.figure.remove(); shown.delete(id); } });
      fresh.charts.forEach(function (chart) { if (shown.has(chart.id)) shown.get(chart.id).chart = chart; else place(chart); });
      refresh();
    }
    take(payload);

    // Points that the page has already are left out of a curve that begins at `start`.
    function joined(old, fresh) {
      if (!fresh.start) return fresh;
      if (!old || old.name !== fresh.name || old.size !== fresh.size || old.x.length < fresh.start) throw new Error("unknown points");
      const whole = Object.assign({}, fresh, { start: 0 });
      ["x", "y", "low", "high"].forEach(function (part) { if (fresh[part]) whole[part] = old[part].slice(0, fresh.start).concat(fresh[part]); });
      if (fresh.band) whole.band = fresh.band.map(function (end, number) { return joined(old.band && old.band[number], end); });
      return whole;
    }
    function complete(fresh) {
      fresh.charts.forEach(function (chart) {
        const old = shown.get(chart.id);
        chart.curves = chart.curves.map(function (curve, number) { return joined(old && old.chart.curves[number], curve); });
      });
      return fresh;
    }

    let busy = false, again = false;
    function axis() { return control("axis") ? control("axis").value : "step"; }
    function load() {
      if (!grid.dataset.src) { // a report holds the curves of every axis
        take(axis() === first.axis ? first : first.others[axis()]);
        return;
      }
      if (busy) { again = true; return; }
      busy = true;
      const known = payload.axis === axis() && typeof payload.step === "number" ? "&since=" + payload.step + "&generation=" + payload.generation : "";
      const get = function (more) {
        return fetch(grid.dataset.src + (grid.dataset.src.includes("?") ? "&" : "?") + "axis=" + encodeURIComponent(axis()) + more, { credentials: "same-origin" })
          .then(function (answer) { return answer.ok ? answer.json() : Promise.reject(answer.status); }).then(complete);
      };
      get(known).catch(function (error) { return known && error instanceof Error ? get("") : Promise.reject(error); })
        .then(take).catch(function () { /* the server was stopped */ })
        .finally(function () { busy = false; if (again) { again = false; load(); } });
    }
    if (grid.dataset.stream) gruppo.follow(grid.dataset.stream, function (now) { if (typeof now.revision !== "string" || now.revision !== payload.revision) load(); });
    const on = function (name, kind, action) { const found = control(name); if (found) found.addEventListener(kind, function () { action(found); }); };
    on("smoothing", "input", function (found) { settings.smoothing = Number(found.value); gruppo.remember("gruppo.smoothing", found.value); refresh(); });
    on("logarithmic", "change", function (found) { settings.logarithmic = found.checked; refresh(); });
    on("marks", "change", function (found) { settings.marks = found.checked; refresh(); });
    on("axis", "change", load);
    on("reset", "click", function () {
      shown.forEach(function (state) { if (!state.stale) window.Plotly.relayout(state.plot, { "xaxis.autorange": true, "yaxis.autorange": true }); });
    });
    document.addEventListener("gruppo:theme", refresh);
    section.addEventListener("toggle", function () { refresh(); }, true);
  }
  gruppo.charts = { mount: mount };
  document.addEventListener("DOMContentLoaded", function () { document.querySelectorAll(".charts-section").forEach(mount); });
})();
