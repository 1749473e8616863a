// What the laboratory measures, as rows, and how a row goes from a worker's process to the one that reports. Plain C++.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace gc::lab {

struct Row {
  std::string topic;
  std::string name;
  std::string unit = "us";
  std::string cache;            // cold, warm, or empty where memory plays no part
  double bytes = 0;             // moved in one sample; 0 if it is not about bytes
  std::string status = "ok";    // ok, FAILED, skipped
  std::string note;             // why it failed or was skipped; or what is worth knowing
  std::vector<double> samples;  // in unit

  std::string key() const { return topic + "/" + name; }
  bool good() const { return status == "ok" && !samples.empty(); }
  double median() const {
    if (samples.empty()) return 0;
    std::vector<double> sorted = samples;
    std::sort(sorted.begin(), sorted.end());
    const std::size_t half = sorted.size() / 2;
    return sorted.size() % 2 == 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
  }
  double least() const { return samples.empty() ? 0 : *std::min_element(samples.begin(), samples.end()); }
  double most() const { return samples.empty() ? 0 : *std::max_element(samples.begin(), samples.end()); }
  // Bytes a sample, which is in microseconds.
  double gigabytes_per_second() const { return bytes > 0 && median() > 0 ? bytes / median() / 1e3 : 0; }
};

// The least-squares line through (x, y).
struct Fit {
  double constant = 0;
  double slope = 0;
  int points = 0;
};

inline Fit fit_line(const std::vector<std::pair<double, double>>& points) {
  Fit fit;
  fit.points = static_cast<int>(points.size());
  if (points.size() < 2) return fit;
  double x = 0, y = 0;
  for (const auto& point : points) x += point.first, y += point.second;
  x /= points.size(), y /= points.size();
  double xx = 0, xy = 0;
  for (const auto& point : points) {
    xx += (point.first - x) * (point.first - x);
    xy += (point.first - x) * (point.second - y);
  }
  if (xx == 0) return fit;
  fit.slope = xy / xx;
  fit.constant = y - fit.slope * x;
  return fit;
}

inline std::string format(const char* pattern, double a, double b = 0, double c = 0) {
  char text[512];
  std::snprintf(text, sizeof(text), pattern, a, b, c);
  return text;
}

// --- one line a row, fields between tabs ---

inline std::string one_line(std::string text) {
  for (char& c : text) {
    if (c == '\t' || c == '\n' || c == '\r') c = ' ';
  }
  return text;
}

inline std::string to_line(const Row& row) {
  std::ostringstream line;
  line.precision(9);
  for (const std::string& field : {row.topic, row.name, row.unit, row.cache, row.status, row.note}) {
    line << one_line(field) << '\t';
  }
  line << row.bytes << '\t';
  for (std::size_t i = 0; i < row.samples.size(); ++i) line << (i == 0 ? "" : ",") << row.samples[i];
  return line.str();
}

// False if it is no such line.
inline bool from_line(const std::string& line, Row* row) {
  std::vector<std::string> fields(1);
  for (const char c : line) {
    if (c == '\t') {
      fields.emplace_back();
    } else {
      fields.back() += c;
    }
  }
  if (fields.size() != 8) return false;
  *row = Row{};
  row->topic = fields[0], row->name = fields[1], row->unit = fields[2], row->cache = fields[3];
  row->status = fields[4], row->note = fields[5], row->bytes = std::atof(fields[6].c_str());
  std::istringstream samples(fields[7]);
  for (std::string one; std::getline(samples, one, ',');) row->samples.push_back(std::atof(one.c_str()));
  return true;
}

// --- rows by their key ---

class Results {
 public:
  void add(Row row) {
    places_[row.key()] = rows_.size();
    rows_.push_back(std::move(row));
  }
  const std::vector<Row>& rows() const { return rows_; }
  // Null if there is none, or none that was measured.
  const Row* find(const std::string& key) const {
    const auto place = places_.find(key);
    if (place == places_.end() || !rows_[place->second].good()) return nullptr;
    return &rows_[place->second];
  }
  double median(const std::string& key) const {
    const Row* const row = find(key);
    return row == nullptr ? 0 : row->median();
  }
  // A line through the medians of all rows whose key begins so: microseconds against bytes.
  Fit fit(const std::string& prefix) const {
    std::vector<std::pair<double, double>> points;
    for (const Row& row : rows_) {
      if (row.good() && row.bytes > 0 && row.key().rfind(prefix, 0) == 0) points.emplace_back(row.bytes, row.median());
    }
    return fit_line(points);
  }

 private:
  std::vector<Row> rows_;
  std::map<std::string, std::size_t> places_;
};

}  // namespace gc::lab
