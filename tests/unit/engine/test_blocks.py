from sllm_node.engine.blocks import Blocks, block_key, root_key

SIZE = 4


def keys(*texts, salt=""):
    """Return the keys of blocks, one behind the other, whose tokens are those of `texts`."""
    made = [root_key(salt)]
    for text in texts:
        made.append(block_key(made[-1], [ord(letter) for letter in text]))
    return made[1:]


def chain(blocks, *texts):
    """Fill blocks of a new table, and return it."""
    table = []
    assert blocks.begin(table, (), SIZE * len(texts))
    for index, key in enumerate(keys(*texts)):
        blocks.fill(table, index, key)
    return table


def test_a_key_says_salt_and_past_and_tokens():
    assert keys("abcd", "efgh") == keys("abcd", "efgh")
    assert keys("abcd", "efgh")[1] != keys("abce", "efgh")[1]
    assert keys("abcd")[0] != keys("abcd", salt="a")[0]
    assert keys("abcd", "abcd")[0] != keys("abcd", "abcd")[1]
    assert root_key("\ud800") != root_key("")


def test_known_blocks_stay_cached_and_are_found_up_to_the_first_that_is_not_known():
    blocks = Blocks(8, SIZE)
    table = chain(blocks, "abcd", "efgh")
    first, second = table
    blocks.give_back(table)
    assert (blocks.free, blocks.cached, blocks.usage) == (8, 2, 0.0)
    assert blocks.find(keys("abcd", "efgh", "ijkl")) == [first, second]
    assert blocks.find(keys("abcd", "ijkl", "efgh")) == [first]


def test_found_blocks_are_held_beside_others_and_free_when_the_last_lets_go():
    blocks = Blocks(4, SIZE)
    one, two = chain(blocks, "abcd"), []
    assert blocks.begin(two, blocks.find(keys("abcd")), 6)
    assert two[0] == one[0]
    assert blocks.free == 2
    blocks.give_back(one)
    assert (blocks.free, blocks.cached) == (2, 0)
    blocks.give_back(two)
    assert (blocks.free, blocks.cached) == (4, 1)


def test_what_is_found_does_not_count_as_free_for_the_one_who_finds_it():
    blocks = Blocks(3, SIZE)
    blocks.give_back(chain(blocks, "abcd", "efgh"))
    table = []
    assert not blocks.begin(table, blocks.find(keys("abcd", "efgh")), 4 * SIZE)
    assert (table, blocks.free, blocks.cached) == ([], 3, 2)
    assert blocks.begin(table, blocks.find(keys("abcd", "efgh")), 3 * SIZE)
    assert blocks.free == 0


def test_blank_blocks_are_taken_first_then_ends_of_chains_longest_unused_first():
    blocks = Blocks(5, SIZE)
    old, young = chain(blocks, "abcd", "efgh"), chain(blocks, "ABCD", "EFGH")
    blocks.give_back(old)
    blocks.give_back(young)
    table, left = [], []
    for tokens in range(SIZE, 6 * SIZE, SIZE):
        assert blocks.grow(table, tokens)
        left.append(
            [len(blocks.find(keys(*chained))) for chained in (("abcd", "efgh"), ("ABCD", "EFGH"))]
        )
    assert left == [[2, 2], [1, 2], [0, 2], [0, 1], [0, 0]]
    assert not blocks.grow(table, 6 * SIZE)


def test_what_is_computed_twice_is_exchanged_for_what_is_known():
    blocks = Blocks(4, SIZE)
    one, two = chain(blocks, "abcd", "efgh"), chain(blocks, "abcd", "efgh")
    assert one == two
    assert blocks.free == 2


def test_a_block_behind_one_that_is_not_known_stays_unknown():
    blocks = Blocks(4, SIZE)
    table = []
    assert blocks.begin(table, (), 2 * SIZE)
    blocks.fill(table, 1, keys("abcd", "efgh")[1])
    blocks.give_back(table)
    assert blocks.cached == 0


def test_blocks_that_are_left_behind_are_found_by_others_until_they_are_taken():
    blocks = Blocks(4, SIZE)
    table = chain(blocks, "abcd", "efgh")
    blocks.leave(table, 2)
    assert (table, blocks.free, blocks.cached) == ([], 4, 2)
    assert blocks.grow(table, SIZE)
    made = keys("abcd", "efgh", "ijkl")
    blocks.fill(table, 0, made[2], made[1])
    assert len(blocks.find(made)) == 3
    other = []
    assert blocks.grow(other, 3 * SIZE)
    later = []
    blocks.give_back(table)
    assert blocks.grow(later, SIZE)
    blocks.fill(later, 0, keys("abcd", "efgh", "mnop")[2], made[1])
    assert blocks.cached == 0
    blocks.give_back(later)
    assert (blocks.free, blocks.cached) == (1, 0)


def test_forgotten_blocks_are_not_found_and_stay_with_their_holders():
    blocks = Blocks(4, SIZE)
    held = chain(blocks, "abcd")
    blocks.give_back(chain(blocks, "efgh"))
    blocks.forget()
    assert (blocks.find(keys("abcd")), blocks.find(keys("efgh"))) == ([], [])
    assert (blocks.free, blocks.cached) == (3, 0)
    assert blocks.grow(held, 4 * SIZE)
    assert sorted(held) == [0, 1, 2, 3]
    blocks.give_back(held)
    assert (blocks.free, blocks.cached) == (4, 0)
