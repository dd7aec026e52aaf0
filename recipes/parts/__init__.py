"""What the recipes share. They import it as `parts`, from the folder that they are run from as scripts."""
