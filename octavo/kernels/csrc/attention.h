// Causal attention over the paged cache, for prompts' chunks and single tokens alike (online softmax, Milakov and
// Gimelshein 2018).
//
// The keys of a sequence are cut at fixed positions, into segments of 512 and these into tiles of 64. Each segment is
// computed from nothing, tile after tile, and the segments are joined in their order. A query's result is therefore the
// same whichever queries share its tile and whether one thread took all segments or several shared them.
#pragma once

#include "attention_tiles.h"
#include "attention_tiles8.h"
#include "cached8.h"
#include "elementwise.h"
#include "step.h"

namespace octavo {

constexpr int64_t kKeys = 64;
constexpr int64_t kQueryRows = kTiles ? 96 : 48;  // queries times heads of one piece of work, about
constexpr int64_t kMostRows = kTiles ? 96 : 64;

struct AttentionShape {
  int64_t heads;  // query heads
  CacheShape cache;
  float scale, soft_cap;
  int64_t window;

  int64_t group() const { return heads / cache.kv_heads; }
  int64_t queries() const { return std::max<int64_t>(1, kQueryRows / group()); }
};

// Queries first to first + count - 1 of a row, for one kv head; `segment` is one of them, or -1 for all.
struct Piece { int32_t row, first, count, kv_head, segment, partial; };

// One thread's room for a piece: rows are (query, head of the group).
struct AttentionRoom {
  Lines<int32_t> q, p;
  TwoBytes q_bytes[kMostRows], p_bytes[kMostRows];
  Lines<float> scores, out, total;
  SegmentRoom segment;
  float most[kMostRows], sum[kMostRows], total_most[kMostRows], total_sum[kMostRows], q_scale[kMostRows];
  float k_scales[kKeys], v_scales[kKeys];

  void reserve(int64_t width) {
    if (int64_t(total.size()) >= kMostRows * width) return;
    q.resize(size_t(kMostRows * (width + 16)));
    p.resize(size_t(kMostRows * kKeys));
    scores.resize(size_t(2 * kMostRows * kKeys));
    out.resize(size_t(kMostRows * width));
    total.resize(size_t(kMostRows * width));
    if (kTiles) segment.reserve(width);
  }
};

template <class Dot>
class Attender {
 public:
  Attender(const AttentionShape& shape, const Step& step, Matrix q, Matrix out, const void* k_cache,
           const void* v_cache, AttentionRoom& room)
      : shape(shape), step(step), q(q), out(out), k_cache(k_cache), v_cache(v_cache), room(room) {
    room.reserve(shape.cache.width);
  }

  // Computes a piece as a whole, or one segment of it into `partial`: [rows][width + 2], with largest score and sum.
  void run(const Piece& piece, float* partial) {
    G = shape.group();
    rows = piece.count * G;
    start = step.query_start[piece.row] + piece.first;
    const int64_t tokens = step.query_start[piece.row + 1] - step.query_start[piece.row];
    position = step.seq_lens[piece.row] - tokens + piece.first;
    table = step.block_tables + piece.row * step.table_stride;
    head = piece.kv_head;
    take_queries();
    const int64_t last = position + piece.count - 1;
    const int64_t begin = shape.window > 0 ? std::max<int64_t>(0, position - shape.window + 1) : 0;
    if (piece.segment >= 0) {
      one_segment(piece.segment * kSegment, last, begin);
      return keep(partial);
    }
    std::fill(room.total_most, room.total_most + rows, kNone);
    std::fill(room.total_sum, room.total_sum + rows, 0.0f);
    std::fill(room.total.begin(), room.total.begin() + rows * H(), 0.0f);
    for (int64_t segment = begin / kSegment; segment <= last / kSegment; segment++) {
      one_segment(segment * kSegment, last, begin);
      for (int64_t m = 0; m < rows; m++) join(m, room.most[m], room.sum[m], &room.out[m * H()]);
    }
    finish();
  }

  // Joins the partial results of a piece's segments, which lie one after another, in order.
  void combine(const Piece& piece, const float* partials, int64_t segments) {
    G = shape.group();
    rows = piece.count * G;
    start = step.query_start[piece.row] + piece.first;
    head = piece.kv_head;
    std::fill(room.total_most, room.total_most + rows, kNone);
    std::fill(room.total_sum, room.total_sum + rows, 0.0f);
    std::fill(room.total.begin(), room.total.begin() + rows * H(), 0.0f);
    for (int64_t s = 0; s < segments; s++)
      for (int64_t m = 0; m < rows; m++) {
        const float* part = partials + (s * rows + m) * (H() + 2);
        join(m, part[H()], part[H() + 1], part);
      }
    finish();
  }

 private:
  int64_t H() const { return shape.cache.width; }
  static constexpr int64_t p = Dot::per_lane;
  static constexpr int64_t kLanes = 16 / p;         // of 16 keys, in the cache
  static constexpr int64_t kALanes = Dot::a_lanes;  // of queries and weights, for each of the cache's
  static constexpr bool kRounded = p == 2 && kALanes == 1;  // these are bf16
  static constexpr bool kScaled = p == 4;  // K and V by a scale a token
  static constexpr bool kTiled = kTiles && p > 1;
  static constexpr bool kBytes = std::is_same_v<typename Dot::Sum, vi>;  // queries and weights have two
  static constexpr int kParts = kBytes ? 2 : 1;

  void take_queries() {
    if constexpr (kTiled) {
      for (int64_t m = 0; m < rows; m++) {
        const float* x = q.row(start + m / G) + (head * G + m % G) * H();
        if constexpr (kScaled) room.q_scale[m] = put_query8(x, H(), m, rows, (int8_t*)room.q.data());
        else put_tile_row(x, H(), m, (uint8_t*)room.q.data());
      }
      return;
    }
    const int64_t lanes = H() / p * kALanes;
    for (int64_t m = 0; m < rows; m++) {
      const float* x = q.row(start + m / G) + (head * G + m % G) * H();
      int32_t* to = &room.q[m * kParts * lanes];
      if constexpr (kBytes) {
        room.q_bytes[m] = TwoBytes(x, H(), (int8_t*)to);
      } else if constexpr (!kRounded) {
        std::memcpy(to, x, size_t(H()) * 4);
      } else {
        int64_t i = 0;
        for (; i + 2 * W <= H(); i += 2 * W) store_bf16((uint16_t*)(to + i / 2), load(x + i), load(x + i + W));
        for (; i < H(); i++) ((uint16_t*)to)[i] = to_bf16(x[i]);
      }
    }
  }

  // K or V of the 16 keys from `key` on.
  const int32_t* keys_at(int64_t key) const {
    const CacheShape& c = shape.cache;
    return c.head(k_cache, table[key / c.block_size], head) + key % c.block_size;
  }
  const int32_t* values_at(int64_t key) const {
    const CacheShape& c = shape.cache;
    return c.head(v_cache, table[key / c.block_size], head) + key % c.block_size / p * H();
  }
  void take_scales(int64_t key, int64_t units) {
    const CacheShape& c = shape.cache;
    for (int64_t at = key; at < key + 16 * units; at += 16) {
      const int64_t block = table[at / c.block_size], token = at % c.block_size;
      std::memcpy(room.k_scales + at - key, c.scales(k_cache, block, head) + token, 64);
      std::memcpy(room.v_scales + at - key, c.scales(v_cache, block, head) + token, 64);
    }
  }

  // The keys of a segment up to position `last`, from `begin` on, into room.out, most and sum.
  void one_segment(int64_t first, int64_t last, int64_t begin) {
    const int64_t from = std::max(first, begin / kKeys * kKeys), to = std::min(first + kSegment - 1, last);
    if constexpr (kTiled) {
      const SegmentTask task = {shape.cache, k_cache, v_cache, table, head, from, to, shape.scale, shape.soft_cap, shape.window};
      if constexpr (kScaled)
        return tiled_segment8(task, rows, G, position, (const int8_t*)room.q.data(), room.q_scale, room.segment,
                              room.out.data(), room.most, room.sum);
      else
        return tiled_segment(task, rows, G, position, (const uint8_t*)room.q.data(), room.segment, room.out.data(),
                             room.most, room.sum);
    }
    std::fill(room.most, room.most + rows, kNone);
    std::fill(room.sum, room.sum + rows, 0.0f);
    std::fill(room.out.begin(), room.out.begin() + rows * H(), 0.0f);
    for (int64_t key = from; key <= to; key += kKeys) {
      const int64_t units = std::min<int64_t>(kKeys / 16, (to - key) / 16 + 1);
      if constexpr (kScaled) take_scales(key, units);
      score(key, units);
      for (int64_t m = 0; m < rows; m++) soften(m, key, units);
      weigh(key, units);
    }
  }

  void score(int64_t key, int64_t units) {
    constexpr int kVectors = kTileVectors, kUnits = kTileVectors * W / 16;
    const int64_t lanes = H() / p;
    for (int64_t u = 0; u < units; u += kUnits) {
      const int32_t* b[kVectors];
      for (int v = 0; v < kVectors; v++) b[v] = keys_at(key + 16 * std::min(u + v * W / 16, units - 1)) + v * W % 16;
      in_tiles<kTileRows>(rows * kParts, [&](int64_t first, auto height) {
        constexpr int Rows = decltype(height)::value;
        typename Dot::Sum sum[Rows][kVectors] = {};
        multiply<Dot>(sum, &room.q[first * lanes * kALanes], lanes * kALanes, b, shape.cache.block_size, lanes);
        for (int m = 0; m < Rows; m++)
          for (int v = 0; v < kVectors; v++)
            if (u + v * W / 16 < units) store(&room.scores[(first + m) * kKeys + 16 * u + v * W], (vf)sum[m][v]);
      });
    }
  }

  // Scores of one row to weights (room.p), with the running largest and sum; what was computed so far is scaled down.
  void soften(int64_t m, int64_t key, int64_t units) {
    float* s = &room.scores[m * kParts * kKeys];
    const int64_t place = position + m / G;  // of the query
    const int64_t oldest = shape.window > 0 ? place - shape.window + 1 : 0;
    const bool whole = key + 16 * units - 1 <= place && key >= oldest;
    const vf scale = set(shape.scale * 1.44269504f * (kBytes ? room.q_bytes[m].scale : 1.0f)), none = set(kNone);
    vf most = none;
    for (int64_t i = 0; i < 16 * units; i += W) {
      vf x = load(s + i);
      if constexpr (kBytes) x = room.q_bytes[m].whole((vi)x, load_lanes(s + kKeys + i));
      x = x * scale;
      if constexpr (kScaled) x = x * load(room.k_scales + i);
      if (shape.soft_cap > 0) x = capped(x, shape.soft_cap);
      if (!whole) {
        const vi index = lane_numbers() + int32_t(key + i);
        x = index > int32_t(place) || index < int32_t(oldest) ? none : x;
      }
      most = max(most, x);
      store(s + i, x);
    }
    const float before = room.most[m], now = std::max(before, largest(most));
    room.most[m] = now;
    const float shrink = before == now ? 1.0f : before == kNone ? 0.0f : exp2_of(before - now);
    const vf top = set(now == kNone ? 0.0f : now);
    vf total{};
    for (int64_t i = 0; i < 16 * units; i += 2 * W) {
      const bool two = i + W < 16 * units;
      vf first = load(s + i), second = two ? load(s + i + W) : none;
      first = first > none ? exp2(first - top) : vf{};
      second = second > none ? exp2(second - top) : vf{};
      total = total + first;
      total = total + second;
      if constexpr (kScaled) {  // a stale scale behind the last key may be anything
        auto scaled = [&](vf weight, int64_t j) {
          return weight > vf{} ? weight * load(room.v_scales + j) : vf{};
        };
        first = scaled(first, i);
        if (two) second = scaled(second, i + W);
      }
      if constexpr (kBytes) {
        store(s + i, first);
        if (two) store(s + i + W, second);
      } else if constexpr (!kRounded) {
        store((float*)&room.p[m * kKeys + i], first);
        if (two) store((float*)&room.p[m * kKeys + i + W], second);
      } else {
        store_bf16((uint16_t*)&room.p[m * kKeys / 2 + i / 2], first, second);
      }
    }
    if constexpr (kBytes) {  // behind the units nothing is multiplied
      std::fill(s + 16 * units, s + kKeys, 0.0f);
      room.p_bytes[m] = TwoBytes(s, kKeys, (int8_t*)&room.p[m * 2 * kKeys / p]);
    }
    room.sum[m] = room.sum[m] * shrink + sum(total);
    if (shrink != 1.0f) {
      float* o = &room.out[m * H()];
      for (int64_t h = 0; h < H(); h += W) store(o + h, load(o + h) * set(shrink));
    }
  }

  // room.out += weights times values.
  void weigh(int64_t key, int64_t units) {
    int64_t h = 0;
    for (; h + kValueVectors * W <= H(); h += kValueVectors * W) weigh_columns<kValueVectors>(key, units, h);
    with_rows<kValueVectors>((H() - h) / W, [&](auto vectors) { weigh_columns<decltype(vectors)::value>(key, units, h); });
  }

  template <int Vectors>
  void weigh_columns(int64_t key, int64_t units, int64_t h) {
    constexpr int64_t lanes_of_row = kKeys / p * kALanes;
    in_tiles<kValueRows / kParts>(rows, [&](int64_t first, auto height) {
      constexpr int Rows = decltype(height)::value;
      typename Dot::Sum sum[Rows * kParts][Vectors] = {};
      auto out = [&](int m, int v) { return &room.out[(first + m) * H() + h + v * W]; };
      for (int m = 0; m < Rows && !kBytes; m++)
        for (int v = 0; v < Vectors; v++) sum[m][v] = (typename Dot::Sum)load(out(m, v));
      for (int64_t u = 0; u < units; u++) {
        const int32_t* values = values_at(key + 16 * u) + h;
        const int32_t* b[Vectors];
        for (int v = 0; v < Vectors; v++) b[v] = values + v * W;
        multiply<Dot>(sum, &room.p[first * kParts * lanes_of_row + u * kLanes * kALanes], lanes_of_row, b, H(), kLanes);
      }
      for (int m = 0; m < Rows; m++)
        for (int v = 0; v < Vectors; v++) {
          if constexpr (kBytes) {
            const TwoBytes& bytes = room.p_bytes[first + m];
            store(out(m, v), fma(bytes.whole(sum[2 * m][v], sum[2 * m + 1][v]), set(bytes.scale), load(out(m, v))));
          } else {
            store(out(m, v), sum[m][v]);
          }
        }
    });
  }

  void join(int64_t m, float most, float sum, const float* part) {
    if (most == kNone) return;
    const float now = std::max(room.total_most[m], most);
    const float ours = room.total_most[m] == kNone ? 0.0f : exp2_of(room.total_most[m] - now);
    const float theirs = exp2_of(most - now);
    room.total_most[m] = now;
    room.total_sum[m] = room.total_sum[m] * ours + sum * theirs;
    float* total = &room.total[m * H()];
    for (int64_t h = 0; h < H(); h += W) store(total + h, fma(load(part + h), set(theirs), load(total + h) * set(ours)));
  }

  void keep(float* partial) {
    for (int64_t m = 0; m < rows; m++) {
      float* to = partial + m * (H() + 2);
      std::memcpy(to, &room.out[m * H()], size_t(H()) * 4);
      to[H()] = room.most[m];
      to[H() + 1] = room.sum[m];
    }
  }

  void finish() {
    for (int64_t m = 0; m < rows; m++) {
      float* to = out.row(start + m / G) + (head * G + m % G) * H();
      const vf inverse = set(1.0f / room.total_sum[m]);
      for (int64_t h = 0; h < H(); h += W) store(to + h, load(&room.total[m * H() + h]) * inverse);
    }
  }

  const AttentionShape& shape;
  const Step& step;
  const Matrix q, out;
  const void* const k_cache;
  const void* const v_cache;
  AttentionRoom& room;
  int64_t G = 0, rows = 0, start = 0, position = 0, head = 0;
  const int32_t* table = nullptr;
};

// How a step's attention is cut into pieces: the same for all layers of one shape.
struct Pieces {
  std::vector<Piece> all;
  std::vector<std::pair<Piece, int32_t>> split;  // pieces computed by segments, with the number of these
  std::vector<float> partials;

  void plan(const AttentionShape& shape, const Step& step, int threads) {
    all.clear();
    split.clear();
    const int64_t per_piece = shape.queries();
    int64_t pieces = 0;
    for (int32_t r = 0; r < step.rows; r++)
      pieces += (step.query_start[r + 1] - step.query_start[r] + per_piece - 1) / per_piece * shape.cache.kv_heads;
    // Long work first, so that the threads end together: later queries of a row see more keys.
    const bool few = threads > 1 && pieces < 8 * threads && shape.window == 0;
    int64_t room = 0;
    for (int32_t r = 0; r < step.rows; r++) {
      const int32_t count = step.query_start[r + 1] - step.query_start[r];
      for (int64_t first = (count - 1) / per_piece * per_piece; first >= 0; first -= per_piece) {
        const int32_t n = int32_t(std::min<int64_t>(per_piece, count - first));
        const int64_t segments = (step.seq_lens[r] - count + first + n - 1) / kSegment + 1;
        for (int32_t head = 0; head < shape.cache.kv_heads; head++) {
          Piece piece = {r, int32_t(first), n, head, -1, 0};
          if (!few || segments == 1) {
            all.push_back(piece);
            continue;
          }
          piece.partial = int32_t(room);
          split.push_back({piece, int32_t(segments)});
          for (int32_t s = 0; s < segments; s++) {
            piece.segment = s;
            piece.partial = int32_t(room);
            all.push_back(piece);
            room += n * shape.group() * (shape.cache.width + 2);
          }
        }
      }
    }
    if (int64_t(partials.size()) < room) partials.resize(size_t(room));
  }
};

template <class Dot>
inline void attention(Team& team, const AttentionShape& shape, const Step& step, Pieces& pieces, Matrix q,
                      Matrix out, const void* k_cache, const void* v_cache, AttentionRoom& room) {
  Attender<Dot> attender(shape, step, q, out, k_cache, v_cache, room);
  for (int64_t i = team.next(); i < int64_t(pieces.all.size()); i = team.next()) {
    const Piece& piece = pieces.all[size_t(i)];
    attender.run(piece, pieces.partials.data() + piece.partial);
  }
  if (pieces.split.empty()) return;
  team.barrier();
  const auto [begin, end] = team.share(int64_t(pieces.split.size()));
  for (int64_t i = begin; i < end; i++) {
    const auto& [piece, segments] = pieces.split[size_t(i)];
    attender.combine(piece, pieces.partials.data() + piece.partial, segments);
  }
}

}  // namespace octavo
