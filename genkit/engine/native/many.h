// Products of integers with many rows; included in the middle of kernels.h.
//
// The levels of two panels are widened to 16 bits once for all rows of a block, and a tile of rows
// and panels has its sums in registers. They are the sums of multiply_panel, in the same order.

constexpr int64_t MANY = 12;             // rows, from which on widening pays
constexpr int HEIGHT = 6;                // rows of a tile; 12 sums fit into registers
constexpr int64_t ROOM = 1 << 17;        // levels of a block of rows, which stay in a core's cache
constexpr int64_t PAIRS = GROUP / 2;

// Pairs of levels of a group of two panels.
struct WideGroup {
    Int16s levels[PAIRS][2];
};

inline void widen(const Int8Block& block, int panel, WideGroup& wide) {
    for (int64_t four = 0; four < GROUP / 4; ++four) {
        Int16s levels = *reinterpret_cast<const Int16s*>(block.levels[four]);
        wide.levels[2 * four][panel] = (levels << 8) >> 8;
        wide.levels[2 * four + 1][panel] = levels >> 8;
    }
}

inline void widen(const Int4Block& block, int panel, WideGroup& wide) {
    for (int64_t eight = 0; eight < GROUP / 8; ++eight) {
        UInt16s codes = *reinterpret_cast<const UInt16s*>(block.codes[eight]);
        for (int pair = 0; pair < 4; ++pair)
            wide.levels[4 * eight + pair][panel] = Int16s((codes >> (4 * pair)) & 15);
    }
}

// A group of two panels times the same group of some rows.
template <int ROWS>
inline void add_wide(Ints (*totals)[2], const WideGroup& wide, const int16_t* const* x) {
#pragma GCC unroll 1  // unrolled, more sums are in flight than there are registers
    for (int64_t pair = 0; pair < PAIRS; ++pair) {
        Int16s first = wide.levels[pair][0], second = wide.levels[pair][1];
        for (int row = 0; row < ROWS; ++row) {
            totals[row][0] = add_pair(totals[row][0], first, x[row] + 2 * pair);
            totals[row][1] = add_pair(totals[row][1], second, x[row] + 2 * pair);
        }
    }
}

template <int ROWS, typename Block>
void multiply_tall(const Block* blocks, const WideGroup* wide, int64_t groups,
                   const QuantizedRow* rows, Floats (*sums)[HEIGHT]) {
    for (int row = 0; row < ROWS; ++row) sums[0][row] = sums[1][row] = Floats{};
    for (int64_t group = 0; group < groups; ++group) {
        const int16_t* x[ROWS];
        for (int row = 0; row < ROWS; ++row) x[row] = rows[row].levels + group * GROUP;
        Ints totals[ROWS][2] = {};
        add_wide<ROWS>(totals, wide[group], x);
        for (int panel = 0; panel < 2; ++panel) {
            const Block& block = blocks[panel * groups + group];
            Floats scales = widen_float16(block.scales);
            for (int row = 0; row < ROWS; ++row) {
                Floats products = __builtin_convertvector(totals[row][panel], Floats);
                Floats& own = sums[panel][row];
                own = multiply_add(products, scales * rows[row].scales[group], own);
                own = add_minima(own, block, rows[row].sums[group]);
            }
        }
    }
}

// Some rows times two panels, whose first is `panel`.
template <typename Block>
void multiply_tiles(const Matrix& matrix, int64_t panel, const WideGroup* wide,
                    const QuantizedRows& x, int64_t from, int64_t to, float* y, int64_t stride) {
    const Block* blocks = static_cast<const Block*>(matrix.weights) + panel * matrix.groups();
    for (int64_t row = from; row < to; row += HEIGHT) {
        QuantizedRow tile[HEIGHT];
        Floats sums[2][HEIGHT];
        int64_t height = std::min<int64_t>(HEIGHT, to - row);
        for (int64_t i = 0; i < height; ++i) tile[i] = x[row + i];
        auto function = height == 1   ? multiply_tall<1, Block>
                        : height == 2 ? multiply_tall<2, Block>
                        : height == 3 ? multiply_tall<3, Block>
                        : height == 4 ? multiply_tall<4, Block>
                        : height == 5 ? multiply_tall<5, Block>
                                      : multiply_tall<6, Block>;
        function(blocks, wide, matrix.groups(), tile, sums);
        for (int i = 0; i < 2; ++i)
            store_panel(matrix, panel + i, sums[i], height, y + row * stride, stride);
    }
}

template <typename Block>
void multiply_many(const Matrix& matrix, const QuantizedRows& x, int64_t rows, float* y,
                   int64_t stride, int64_t first, int64_t last) {
    int64_t groups = matrix.groups(), even = first + (last - first) / 2 * 2;
    int64_t height = std::max<int64_t>(1, ROOM / (groups * GROUP) / HEIGHT) * HEIGHT;
    static thread_local std::vector<WideGroup> wide;
    wide.resize(std::max<size_t>(wide.size(), groups));
    for (int64_t from = 0; from < rows; from += height)
        for (int64_t panel = first; panel < even; panel += 2) {
            const Block* blocks = static_cast<const Block*>(matrix.weights) + panel * groups;
            for (int64_t group = 0; group < groups; ++group)
                for (int i = 0; i < 2; ++i) widen(blocks[i * groups + group], i, wide[group]);
            multiply_tiles<Block>(matrix, panel, wide.data(), x, from,
                                  std::min(rows, from + height), y, stride);
        }
    multiply_panels<Block>(matrix, x, rows, y, stride, even, last);
}
