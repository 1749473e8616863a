// The table and the JSON file. Plain C++.
#pragma once

#include <cstdio>

#include "decide.h"

namespace gc::lab {

using Facts = std::vector<std::pair<std::string, std::string>>;  // of the machine and the run

inline std::string cell_text(std::string text) {
  for (std::size_t i = 0; (i = text.find('|', i)) != std::string::npos; i += 2) text.insert(i, "\\");
  return text;
}

inline std::string number(double value) { return format(value >= 100 ? "%.1f" : value >= 10 ? "%.2f" : "%.3f", value); }

// Markdown.
inline std::string table(const Results& results, const Facts& facts) {
  std::ostringstream out;
  for (const auto& fact : facts) out << "- " << fact.first << ": " << fact.second << '\n';
  std::string topic;
  for (const Row& row : results.rows()) {
    if (row.topic != topic) {
      topic = row.topic;
      out << "\n## " << topic << "\n\n";
      out << "| variant | cache | median | min | max | unit | GB/s | checked | rule | verdict |\n";
      out << "|---|---|--:|--:|--:|---|--:|---|---|---|\n";
    }
    const Judgement judgement = judge(results, row);
    out << "| " << cell_text(row.name) << " | " << row.cache << " | ";
    if (row.good()) {
      out << number(row.median()) << " | " << number(row.least()) << " | " << number(row.most()) << " | " << row.unit;
      out << " | " << (row.bytes > 0 ? format("%.0f", row.gigabytes_per_second()) : "") << " | ";
    } else {
      out << " | | | | | ";
    }
    out << row.status << " | " << cell_text(judgement.rule) << " | " << cell_text(judgement.verdict);
    const bool said = row.note.empty() || judgement.verdict.find(row.note) != std::string::npos;
    out << (said ? "" : (judgement.verdict.empty() ? "" : "; ") + cell_text(row.note)) << " |\n";
  }
  const std::vector<std::string> found = findings(results);
  if (!found.empty()) out << "\n## What follows\n\n";
  for (const std::string& line : found) out << "- " << line << '\n';
  return out.str();
}

inline std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char code[8];
      std::snprintf(code, sizeof(code), "\\u%04x", static_cast<unsigned>(c));
      out += code;
    } else {
      out += c;
    }
  }
  return out + '"';
}

// A number of JSON, which has no infinities.
inline std::string json_number(double value) { return std::isfinite(value) ? format("%.9g", value) : "null"; }

inline std::string json(const Results& results, const Facts& facts) {
  std::ostringstream out;
  out << "{\n \"facts\": {";
  for (std::size_t i = 0; i < facts.size(); ++i) {
    out << (i == 0 ? "\n  " : ",\n  ") << quoted(facts[i].first) << ": " << quoted(facts[i].second);
  }
  out << "\n },\n \"findings\": [";
  const std::vector<std::string> found = findings(results);
  for (std::size_t i = 0; i < found.size(); ++i) out << (i == 0 ? "\n  " : ",\n  ") << quoted(found[i]);
  out << "\n ],\n \"rows\": [";
  bool first = true;
  for (const Row& row : results.rows()) {
    const Judgement judgement = judge(results, row);
    out << (first ? "\n  {" : ",\n  {");
    first = false;
    out << "\"topic\": " << quoted(row.topic) << ", \"name\": " << quoted(row.name)
        << ", \"unit\": " << quoted(row.unit) << ", \"cache\": " << quoted(row.cache)
        << ", \"status\": " << quoted(row.status) << ", \"note\": " << quoted(row.note)
        << ", \"rule\": " << quoted(judgement.rule) << ", \"verdict\": " << quoted(judgement.verdict)
        << ", \"bytes\": " << json_number(row.bytes);
    if (row.good()) {
      out << ", \"median\": " << json_number(row.median()) << ", \"min\": " << json_number(row.least())
          << ", \"max\": " << json_number(row.most());
    }
    out << ", \"samples\": [";
    for (std::size_t i = 0; i < row.samples.size(); ++i) out << (i == 0 ? "" : ", ") << json_number(row.samples[i]);
    out << "]}";
  }
  out << "\n ]\n}\n";
  return out.str();
}

}  // namespace gc::lab
