//! Curves, maps, bars and scatter plots as SVG for the page's style sheet.
//!
//! In: numbers and words. Out: one `svg` element with a title and a description, as wide as a telephone's column, so that it is
//! shown in its natural size everywhere, and a wider page has more of them in a row.
//!
//! [`plotters`] writes a colour into every element. Each [`Paint`] has a colour that nothing else has, which is replaced by a class.
//! It also rounds places to whole units, so that a unit here is a tenth of a pixel. Its texts name a generic font; the style sheet
//! names the page's.

use std::fmt::Write;

use minijinja::HtmlEscape;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::ReportError;
use super::axis::Axis;
use super::text::visible;

/// What a figure is called and shows, for those who do not see it.
pub(super) struct Caption {
    /// Unlike any other on the page, and fit for an `id`.
    pub(super) id: String,
    pub(super) title: String,
    pub(super) description: String,
}

/// A line through points.
pub(super) struct Curve {
    pub(super) x: Axis,
    pub(super) y: Axis,
    /// By x. Those that an axis does not show are left out.
    pub(super) points: Vec<(f64, f64)>,
    /// A value of y that was not to be exceeded.
    pub(super) limit: Option<f64>,
    /// The place of the point that was chosen.
    pub(super) chosen: Option<usize>,
}

/// A point of a scatter plot.
pub(super) struct Spot {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) label: String,
    pub(super) standing: Standing,
    /// Whether it is the one that was taken.
    pub(super) chosen: bool,
}

/// How a point compares with the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// No other is better in one direction and as good in the other.
    OnFront,
    /// Another one is.
    Dominated,
}

/// Draws a line through points, each of them marked unless they are many.
pub(super) fn curve(caption: &Caption, curve: &Curve) -> Result<String, ReportError> {
    let marks = curve.points.len() <= MARKS;
    let shown = |&(x, y): &(f64, f64)| curve.x.shows(x) && curve.y.shows(y);
    let points = || curve.points.iter().copied().filter(shown);
    draw(caption, CURVE_HEIGHT, |area| {
        let mut chart = axes(area, &curve.x, &curve.y)?;
        if let Some(limit) = curve.limit.filter(|limit| curve.y.shows(*limit)) {
            let ends = curve.x.ends().map(|x| (x, limit));
            chart.draw_series(LineSeries::new(ends, Paint::Limit.line(14)))?;
        }
        chart.draw_series(LineSeries::new(points(), Paint::Line.line(18)))?;
        if marks {
            let circles = points().map(|point| Circle::new(point, 24, Paint::Mark.fill()));
            chart.draw_series(circles)?;
        }
        let chosen = curve.chosen.and_then(|chosen| curve.points.get(chosen));
        if let Some(&point) = chosen.filter(|point| shown(point)) {
            chart.draw_series([Circle::new(point, 55, Paint::Chosen.line(16))])?;
        }
        Ok(())
    })
}

/// Draws points with their labels, and a staircase along those that no other point is better than.
pub(super) fn scatter(
    caption: &Caption,
    x: &str,
    y: &str,
    spots: &[Spot],
) -> Result<String, ReportError> {
    let x = Axis::of(x, spots.iter().map(|spot| spot.x));
    let y = Axis::of(y, spots.iter().map(|spot| spot.y));
    let spots: Vec<&Spot> = spots
        .iter()
        .filter(|spot| x.shows(spot.x) && y.shows(spot.y))
        .collect();
    let mut front: Vec<(f64, f64)> = spots
        .iter()
        .filter(|spot| spot.standing == Standing::OnFront)
        .map(|spot| (spot.x, spot.y))
        .collect();
    front.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
    let corners = front
        .windows(2)
        .flat_map(|pair| [pair[0], (pair[1].0, pair[0].1)]);
    let stairs: Vec<(f64, f64)> = corners.chain(front.last().copied()).collect();
    draw(caption, SCATTER_HEIGHT, |area| {
        let mut chart = axes(area, &x, &y)?;
        chart.draw_series(LineSeries::new(stairs, Paint::Limit.line(12)))?;
        for spot in &spots {
            let at = (spot.x, spot.y);
            let circle = match spot.standing {
                Standing::OnFront => Circle::new(at, 36, Paint::Mark.fill()),
                Standing::Dominated => Circle::new(at, 32, Paint::Axis.line(14)),
            };
            chart.draw_series([circle])?;
            if spot.chosen {
                chart.draw_series([Circle::new(at, 70, Paint::Chosen.line(18))])?;
            }
        }
        let places: Vec<(i32, i32)> = spots
            .iter()
            .map(|spot| chart.backend_coord(&(spot.x, spot.y)))
            .collect();
        let labels = label_places(&places, SCATTER_HEIGHT - FOOT - 100);
        for (spot, place) in spots.iter().zip(labels) {
            let style = text(110, Paint::Ink, HPos::Center, VPos::Center);
            if let Some(place) = place {
                area.draw(&Text::new(spot.label.clone(), place, style))?;
            }
        }
        Ok(())
    })
}

/// Where the label of each of `places` goes: to that of four corners which is farthest from the other points and the labels so far; nowhere, where
/// it would cover one. Below `bottom` is the axis.
fn label_places(places: &[(i32, i32)], bottom: i32) -> Vec<Option<(i32, i32)>> {
    let mut labels: Vec<Option<(i32, i32)>> = Vec::with_capacity(places.len());
    for (index, &(x, y)) in places.iter().enumerate() {
        let corners = [
            (x + 105, y - 75),
            (x - 105, y - 75),
            (x + 105, y + 90),
            (x - 105, y + 90),
        ];
        let room = |corner: (i32, i32)| {
            let others = places
                .iter()
                .enumerate()
                .filter(|(other, _)| *other != index)
                .map(|(_, place)| place);
            let distances = others.chain(labels.iter().flatten()).map(|place| {
                let (right, down) = (i64::from(place.0 - corner.0), i64::from(place.1 - corner.1));
                right * right + down * down
            });
            let outside = corner.1 > bottom || corner.0 > WIDTH - 80;
            if outside {
                0
            } else {
                distances.min().unwrap_or(i64::MAX).min(ROOM * ROOM)
            }
        };
        // The first of those with equal room.
        let best = corners.into_iter().rev().max_by_key(|corner| room(*corner));
        labels.push(best.filter(|corner| room(*corner) >= COVERED * COVERED));
    }
    labels
}

/// Draws a map of shares, a row for each of `rows`: the stronger, the nearer to the largest. `shares` go row by row; nothing where there is none.
pub(super) fn map(
    caption: &Caption,
    rows: &[String],
    columns: &[String],
    shares: &[Vec<Option<f64>>],
) -> Result<String, ReportError> {
    let largest = shares
        .iter()
        .flatten()
        .flatten()
        .copied()
        .fold(0.0, f64::max);
    let lines = Lines::of(rows.len());
    let width = (WIDTH - LEFT) / count(columns.len().max(1));
    // "12.3" in its type takes about 230 units, and a column's name about 75 for each character.
    let numbers = lines.labelled() && width >= 260;
    let letters = usize::try_from(width / 75).unwrap_or(0);
    draw(caption, lines.height(), |area| {
        lines.names(area, rows)?;
        for (column, name) in columns.iter().enumerate() {
            let x = LEFT + width * count(column) + width / 2;
            let style = text(106, Paint::Muted, HPos::Center, VPos::Bottom);
            area.draw(&Text::new(shortened(name, letters), (x, HEAD - 30), style))?;
        }
        for (row, shares) in shares.iter().enumerate() {
            for (column, share) in shares.iter().enumerate() {
                let Some(share) = *share else { continue };
                let (x, y) = (LEFT + width * count(column), lines.top(row));
                let corners = [(x, y), (x + width - 10, y + lines.each - 10)];
                let darkness = if largest > 0.0 {
                    (100.0 * share / largest).round() / 100.0
                } else {
                    0.0
                };
                area.draw(&Rectangle::new(
                    corners,
                    Paint::Heat.colour().mix(darkness).filled(),
                ))?;
                if numbers {
                    let middle = (x + width / 2 - 5, y + lines.each / 2 - 5);
                    let style = text(102, Paint::Ink, HPos::Center, VPos::Center);
                    area.draw(&Text::new(
                        super::number::one_digit(100.0 * share),
                        middle,
                        style,
                    ))?;
                }
            }
        }
        Ok(())
    })
}

/// Draws shares as bars, a row for each of `rows`, in lines as high as those of [`map`].
pub(super) fn bars(
    caption: &Caption,
    rows: &[String],
    shares: &[f64],
) -> Result<String, ReportError> {
    let largest = shares.iter().copied().fold(0.0, f64::max);
    let lines = Lines::of(rows.len());
    draw(caption, lines.height(), |area| {
        lines.names(area, rows)?;
        let room = f64::from(WIDTH - LEFT - 480);
        for (row, &share) in shares.iter().enumerate() {
            let part = if largest > 0.0 { share / largest } else { 0.0 };
            #[expect(clippy::cast_possible_truncation, reason = "within the figure's width")]
            let length = (room * part).round() as i32;
            let y = lines.top(row);
            let corners = [(LEFT, y), (LEFT + length.max(8), y + lines.each - 10)];
            area.draw(&Rectangle::new(corners, Paint::Mark.fill()))?;
            if lines.labelled() {
                let style = text(106, Paint::Ink, HPos::Left, VPos::Center);
                let beside = (LEFT + length + 40, y + lines.each / 2 - 5);
                area.draw(&Text::new(super::number::percent(share), beside, style))?;
            }
        }
        Ok(())
    })
}

/// The lines of a map.
struct Lines {
    number: usize,
    each: i32,
}

impl Lines {
    fn of(number: usize) -> Self {
        let each = (6000 / count(number.max(1))).clamp(50, 170);
        Self { number, each }
    }

    fn height(&self) -> i32 {
        HEAD + self.each * count(self.number) + 20
    }

    fn top(&self, row: usize) -> i32 {
        HEAD + self.each * count(row)
    }

    /// Whether a line is high enough for text.
    fn labelled(&self) -> bool {
        self.each >= 110
    }

    fn names(&self, area: &Area<'_>, rows: &[String]) -> Result<(), PlotError> {
        // As many as do not touch.
        let between = usize::try_from(120 / self.each + 1).unwrap_or(1);
        let between = if self.labelled() { 1 } else { between };
        for (row, name) in rows.iter().enumerate().step_by(between) {
            let style = text(106, Paint::Muted, HPos::Right, VPos::Center);
            let at = (LEFT - 60, self.top(row) + self.each / 2 - 5);
            area.draw(&Text::new(shortened(name, 7), at, style))?;
        }
        Ok(())
    }
}

/// What [`plotters`] fails with: writing to a string does not.
type PlotError = DrawingAreaErrorKind<std::io::Error>;

type Area<'s> = DrawingArea<SVGBackend<'s>, Shift>;
type Chart<'a, 's> = ChartContext<'a, SVGBackend<'s>, Cartesian2d<Axis, Axis>>;

/// Axes with their ticks, and what comes between them is for the caller to draw. The name of the upright one stands above it, where there is one.
fn axes<'a, 's>(area: &'a Area<'s>, x: &Axis, y: &Axis) -> Result<Chart<'a, 's>, PlotError> {
    let head = if y.name().is_empty() { 60 } else { HEAD };
    let name = Text::new(
        shortened(y.name(), 45),
        (0, 30),
        text(110, Paint::Muted, HPos::Left, VPos::Top),
    );
    if !y.name().is_empty() {
        area.draw(&name)?;
    }
    let mut chart = ChartBuilder::on(area)
        .margin_top(head)
        .margin_right(90)
        .set_label_area_size(LabelAreaPosition::Left, LEFT)
        .set_label_area_size(LabelAreaPosition::Bottom, FOOT)
        .build_cartesian_2d(x.clone(), y.clone())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .max_light_lines(0)
        .bold_line_style(Paint::Rule.line(8))
        .axis_style(Paint::Axis.line(10))
        .set_all_tick_mark_size(35)
        .label_style(text(110, Paint::Muted, HPos::Left, VPos::Center))
        .axis_desc_style(text(110, Paint::Muted, HPos::Center, VPos::Center))
        .x_label_formatter(&|place| x.label(*place))
        .y_label_formatter(&|place| y.label(*place))
        .x_desc(shortened(x.name(), 40))
        .draw()?;
    Ok(chart)
}

/// Lets `paint` draw, and makes an element of this page out of it.
fn draw(
    caption: &Caption,
    height: i32,
    paint: impl FnOnce(&Area<'_>) -> Result<(), PlotError>,
) -> Result<String, ReportError> {
    let mut drawn = String::new();
    {
        let size = (WIDTH.unsigned_abs(), height.unsigned_abs());
        let area = SVGBackend::with_string(&mut drawn, size).into_drawing_area();
        paint(&area)
            .and_then(|()| area.present())
            .map_err(|error| ReportError::Figure(error.into()))?;
    }
    for paint in Paint::ALL {
        let RGBColor(red, green, blue) = paint.colour();
        for property in ["fill", "stroke"] {
            let colour = format!("{property}=\"#{red:02X}{green:02X}{blue:02X}\"");
            drawn = drawn.replace(&colour, &format!("class=\"{property}-{}\"", paint.name()));
        }
    }
    for default in [
        " opacity=\"1\"",
        " stroke=\"none\"",
        " stroke-width=\"1\"",
        " font-family=\"sans-serif\"",
    ] {
        drawn = drawn.replace(default, "");
    }
    // The library's own root gives way to one with a name and a role.
    let inside = drawn
        .split_once('>')
        .and_then(|(_, rest)| rest.rsplit_once("</svg>"));
    let (inside, _) = inside.unwrap_or_default();
    let mut svg = String::new();
    let Caption {
        id,
        title,
        description,
    } = caption;
    // Writing to a string does not fail.
    let _ = write!(
        svg,
        "<svg class=\"plot\" role=\"img\" aria-labelledby=\"{id}-title\" aria-describedby=\"{id}-about\" \
         viewBox=\"0 0 {WIDTH} {height}\" width=\"{}\" height=\"{}\">\n<title id=\"{id}-title\">{}</title>\n\
         <desc id=\"{id}-about\">{}</desc>{}</svg>",
        WIDTH / SCALE,
        height / SCALE,
        HtmlEscape(&visible(title)),
        HtmlEscape(&visible(description)),
        inside.replace(">\n", ">").replace("\n</", "</"),
    );
    Ok(svg)
}

fn text(size: i32, paint: Paint, horizontal: HPos, vertical: VPos) -> TextStyle<'static> {
    // The library divides sizes by 1.24.
    let font = ("sans-serif", 1.24 * f64::from(size)).into_font();
    let colour = paint.colour().to_backend_color();
    TextStyle {
        color: colour,
        ..TextStyle::from(font)
    }
    .pos(Pos::new(horizontal, vertical))
}

/// The first of `name`'s characters, at most `letters`.
fn shortened(name: &str, letters: usize) -> String {
    let name = visible(name);
    match name.chars().count() > letters {
        true => name
            .chars()
            .take(letters.saturating_sub(1))
            .chain(['…'])
            .collect(),
        false => name.into_owned(),
    }
}

fn count(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// What a thing is drawn for; the style sheet knows its colour by its name.
#[derive(Clone, Copy)]
enum Paint {
    Ink,
    Muted,
    Rule,
    Axis,
    Line,
    Mark,
    Limit,
    Chosen,
    Heat,
}

impl Paint {
    const ALL: [Self; 9] = [
        Self::Ink,
        Self::Muted,
        Self::Rule,
        Self::Axis,
        Self::Line,
        Self::Mark,
        Self::Limit,
        Self::Chosen,
        Self::Heat,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Ink => "ink",
            Self::Muted => "muted",
            Self::Rule => "rule",
            Self::Axis => "axis",
            Self::Line => "line",
            Self::Mark => "mark",
            Self::Limit => "limit",
            Self::Chosen => "chosen",
            Self::Heat => "heat",
        }
    }

    /// No colour that anybody sees.
    fn colour(self) -> RGBColor {
        RGBColor(0xFE, 0xDC, self as u8)
    }

    fn fill(self) -> ShapeStyle {
        self.colour().filled()
    }

    fn line(self, width: u32) -> ShapeStyle {
        self.colour().stroke_width(width)
    }
}

/// Units of a pixel.
const SCALE: i32 = 10;

/// What a telephone of 360 pixels has between its margins.
const WIDTH: i32 = 3280;

/// What labels beside an axis take.
const LEFT: i32 = 460;

/// What labels above a map take.
const HEAD: i32 = 180;

/// What labels below an axis take.
const FOOT: i32 = 380;

const CURVE_HEIGHT: i32 = 1900;

const SCATTER_HEIGHT: i32 = 2800;

/// From a label's middle to that of another, or of a point: so near, they cover each other; so far, they are far enough.
const COVERED: i64 = 120;
const ROOM: i64 = 260;

/// Points that can be told from one another.
const MARKS: usize = 60;

#[cfg(test)]
mod tests {
    use super::*;

    fn caption() -> Caption {
        Caption {
            id: "a".to_owned(),
            title: "<title> & more".to_owned(),
            description: "about\u{202E}".to_owned(),
        }
    }

    fn spot(x: f64, y: f64) -> Spot {
        Spot {
            x,
            y,
            label: "<1>".to_owned(),
            standing: Standing::OnFront,
            chosen: true,
        }
    }

    #[test]
    fn the_style_sheet_has_all_colours() {
        let names = ["a".to_owned(), "b".to_owned()];
        let curve_of = Curve {
            x: Axis::steps(2),
            y: Axis::of("", [1.0, 2.0]),
            points: vec![(0.0, 1.0), (2.0, 2.0)],
            limit: Some(1.5),
            chosen: Some(0),
        };
        for svg in [
            curve(&caption(), &curve_of),
            scatter(&caption(), "x", "y", &[spot(1.0, 1.0), spot(2.0, 0.5)]),
            map(
                &caption(),
                &names,
                &names,
                &[vec![Some(0.5), None], vec![Some(0.0), Some(0.5)]],
            ),
            bars(&caption(), &names, &[0.5, 0.5]),
        ] {
            let svg = svg.expect("a figure");
            assert!(!svg.contains('#'), "{svg}");
            assert!(svg.contains("class=\"fill-muted\""));
            for class in svg
                .split("class=\"")
                .skip(2)
                .filter_map(|rest| rest.split('"').next())
            {
                assert!(
                    include_str!("page.html").contains(&format!(".{class} {{")),
                    "{class}"
                );
            }
        }
    }

    #[test]
    fn names_and_labels_are_harmless() {
        let svg = scatter(&caption(), "<x>", "\"y\"&", &[spot(1.0, 1.0)]).expect("a figure");
        for text in [
            "&lt;title&gt; &amp; more",
            "about[U+202E]",
            "&lt;1&gt;",
            "&lt;x&gt;",
            "&quot;y&quot;&amp;",
        ] {
            assert!(svg.contains(text), "{text}");
        }
    }

    #[test]
    fn what_no_axis_shows_is_not_drawn() {
        let svg = scatter(&caption(), "", "", &[spot(1e200, 1.0), spot(f64::NAN, 1.0)])
            .expect("a figure");
        assert!(!svg.contains("<circle"));
    }

    #[test]
    fn labels_keep_away_from_points_and_one_another() {
        assert_eq!(label_places(&[(1000, 1000)], 2000), [Some((1105, 925))]);
        // A neighbour on the right, above: the label goes to the left. At the bottom it goes up.
        let labels = label_places(&[(1000, 1000), (1120, 920)], 1050);
        assert_eq!(labels[0], Some((895, 925)));
        assert!(labels[1].is_some_and(|(_, y)| y < 920));
        // No room for a third in one place.
        assert_eq!(label_places(&[(1000, 1000); 9], 2000)[8], None);
    }

    #[test]
    fn long_names_are_shortened() {
        assert_eq!(shortened("gate_up", 7), "gate_up");
        assert_eq!(shortened("gate_upper", 7), "gate_u…");
        assert_eq!(shortened("gate", 0), "…");
    }
}
